// What is said of a mask.

/**
 * Measures what is above a threshold, as `python -m kdseg.predict` does.
 * @param {Float32Array} probability of lesion, pixel by pixel.
 * @param {number} threshold lesion is above.
 * @return {{share: number, confidence: number}} share of the pixels that are
 *     lesion, and their mean probability; with no lesion, that of skin.
 */
export function measure(probability, threshold) {
  // The map has 32-bit numbers: .01 as such is another one than .01.
  const limit = Math.fround(threshold);
  let count = 0;
  let inside = 0;
  let total = 0;
  for (let i = 0; i < probability.length; i++) {
    const value = probability[i];
    total += value;
    if (value > limit) {
      count += 1;
      inside += value;
    }
  }
  return {
    share: count / probability.length,
    confidence: count ? inside / count : 1 - total / probability.length,
  };
}
