// Pillow's bilinear resize, number for number: the network was trained on what
// it gives and scored on what it brings back, and a canvas scales otherwise.

const PRECISION = 22; // bits behind the point, as in Pillow's 8-bit passes

/**
 * Weighs the pixels that make each pixel of a resized row.
 * @param {number} from pixels there are.
 * @param {number} to pixels wanted.
 * @return {{first: Int32Array, count: Int32Array, weights: Float64Array,
 *     width: number}} for result i, weights[i * width + k] of pixel
 *     first[i] + k, k < count[i].
 */
export function makeWeights(from, to) {
  const scale = from / to;
  // Widened when shrinking, so that no pixel is skipped.
  const support = Math.max(scale, 1);
  const width = Math.ceil(support) * 2 + 1;
  const first = new Int32Array(to);
  const count = new Int32Array(to);
  const weights = new Float64Array(to * width);
  for (let i = 0; i < to; i++) {
    const center = (i + 0.5) * scale;
    const low = Math.max(0, Math.trunc(center - support + 0.5));
    const high = Math.min(from, Math.trunc(center + support + 0.5));
    let total = 0;
    for (let k = 0; k < high - low; k++) {
      const gap = Math.abs((k + low - center + 0.5) * (1 / support));
      const weight = gap < 1 ? 1 - gap : 0;
      weights[i * width + k] = weight;
      total += weight;
    }
    for (let k = 0; k < high - low; k++) weights[i * width + k] /= total;
    first[i] = low;
    count[i] = high - low;
  }
  return { first, count, weights, width };
}

function toFixedPoint(weights) {
  const fixed = new Int32Array(weights.length);
  for (let i = 0; i < weights.length; i++) {
    fixed[i] = Math.trunc(0.5 + weights[i] * (1 << PRECISION));
  }
  return fixed;
}

/**
 * Takes the rows of an image as they come, so that it need never lie in memory
 * whole, and gives it resized to a square.
 */
export class SquareResizer {
  /**
   * @param {number} width of the image.
   * @param {number} height of the image.
   * @param {number} size side of the square.
   */
  constructor(width, height, size) {
    Object.assign(this, { width, height, size });
    this.across = makeWeights(width, size);
    this.fixed = toFixedPoint(this.across.weights);
    this.rows = new Uint8Array(height * size * 3);
    this.filled = 0;
  }

  /** @param {Uint8ClampedArray} rgba whole rows, below those added before. */
  add(rgba) {
    const { width, size, rows, fixed } = this;
    const count = rgba.length / (4 * width);
    for (let y = 0; y < count; y++) {
      let out = (this.filled + y) * size * 3;
      const row = y * width * 4;
      for (let x = 0; x < size; x++) {
        if (width === size) {
          const at = row + x * 4;
          rows[out++] = rgba[at];
          rows[out++] = rgba[at + 1];
          rows[out++] = rgba[at + 2];
          continue;
        }
        const end = this.across.count[x];
        let at = row + this.across.first[x] * 4;
        let weight = x * this.across.width;
        let red = 1 << (PRECISION - 1);
        let green = red;
        let blue = red;
        for (let k = 0; k < end; k++, at += 4, weight++) {
          red += rgba[at] * fixed[weight];
          green += rgba[at + 1] * fixed[weight];
          blue += rgba[at + 2] * fixed[weight];
        }
        rows[out++] = Math.min(255, red >> PRECISION);
        rows[out++] = Math.min(255, green >> PRECISION);
        rows[out++] = Math.min(255, blue >> PRECISION);
      }
    }
    this.filled += count;
  }

  /** @return {Uint8Array} [size, size, 3], when every row was added. */
  finish() {
    const { height, size, rows } = this;
    if (this.filled !== height) {
      throw new Error(`${this.filled} of ${height} rows were added`);
    }
    if (height === size) return rows;
    const down = makeWeights(height, size);
    const fixed = toFixedPoint(down.weights);
    const stride = size * 3;
    const square = new Uint8Array(size * stride);
    const sums = new Int32Array(stride);
    for (let y = 0; y < size; y++) {
      sums.fill(1 << (PRECISION - 1));
      for (let k = 0; k < down.count[y]; k++) {
        const weight = fixed[y * down.width + k];
        const row = (down.first[y] + k) * stride;
        for (let i = 0; i < stride; i++) sums[i] += rows[row + i] * weight;
      }
      for (let i = 0; i < stride; i++) {
        square[y * stride + i] = Math.min(255, sums[i] >> PRECISION);
      }
    }
    return square;
  }
}

/**
 * Brings a probability map to another size.
 * @param {Float32Array} map [size, size].
 * @param {number} size its side.
 * @param {number} width wanted.
 * @param {number} height wanted.
 * @return {Float32Array} [height, width].
 */
export function resizeMap(map, size, width, height) {
  let rows = map;
  if (width !== size) {
    const across = makeWeights(size, width);
    rows = new Float32Array(size * width);
    for (let y = 0; y < size; y++) {
      for (let x = 0; x < width; x++) {
        const at = y * size + across.first[x];
        const weight = x * across.width;
        let sum = 0;
        for (let k = 0; k < across.count[x]; k++) {
          sum += map[at + k] * across.weights[weight + k];
        }
        rows[y * width + x] = sum;
      }
    }
  }
  if (height === size) return rows === map ? map.slice() : rows;
  const down = makeWeights(size, height);
  const resized = new Float32Array(height * width);
  const sums = new Float64Array(width);
  for (let y = 0; y < height; y++) {
    sums.fill(0);
    for (let k = 0; k < down.count[y]; k++) {
      const weight = down.weights[y * down.width + k];
      const row = (down.first[y] + k) * width;
      for (let x = 0; x < width; x++) sums[x] += rows[row + x] * weight;
    }
    resized.set(sums, y * width);
  }
  return resized;
}
