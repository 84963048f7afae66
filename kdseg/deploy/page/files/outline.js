// The outline of a mask as lines between pixels: marching squares.

/**
 * Follows the border of what is above a threshold.
 * @param {Float32Array} map [size, size], pixel centres at half integers.
 * @param {number} size its side.
 * @param {number} threshold inside is above.
 * @return {number[][][]} closed lines of [x, y] in [0, 1]; outside the frame is
 *     background, so that they close along it.
 */
export function findOutline(map, size, threshold) {
  // Two rings around the map: its edge again at the frame, then background.
  const side = size + 4;
  const grid = new Float64Array(side * side).fill(-1);
  const clamp = (i) => Math.min(size - 1, Math.max(0, i - 2));
  for (let y = 1; y < side - 1; y++) {
    for (let x = 1; x < side - 1; x++) {
      grid[y * side + x] = map[clamp(y) * size + clamp(x)];
    }
  }
  const place = (i) => Math.min(size, Math.max(0, i - 1.5)) / size;

  // An edge between neighbours is named by its upper or left end and its
  // direction; each crossed one is left once and entered once.
  const next = new Map();
  const points = new Map();
  const cross = (x, y, down) => {
    const name = 2 * (y * side + x) + down;
    if (!points.has(name)) {
      const a = grid[y * side + x];
      const b = grid[(y + down) * side + x + 1 - down];
      const share = (threshold - a) / (b - a);
      const from = [place(x), place(y)];
      const to = [place(x + 1 - down), place(y + down)];
      points.set(
        name,
        from.map((start, i) => start + share * (to[i] - start)),
      );
    }
    return name;
  };
  for (let y = 0; y < side - 1; y++) {
    for (let x = 0; x < side - 1; x++) {
      const at = y * side + x;
      const first = grid[at] > threshold;
      if (
        first === grid[at + 1] > threshold &&
        first === grid[at + side + 1] > threshold &&
        first === grid[at + side] > threshold
      ) {
        continue;
      }
      const corners = [
        grid[at],
        grid[at + 1],
        grid[at + side + 1],
        grid[at + side],
      ];
      const inside = corners.map((value) => value > threshold);
      // Clockwise from the top; an edge is crossed into the mask or out of it.
      const edges = [
        [x, y, 0],
        [x + 1, y, 1],
        [x, y + 1, 0],
        [x, y, 1],
      ];
      const entries = [];
      const exits = [];
      for (let k = 0; k < 4; k++) {
        if (inside[k] === inside[(k + 1) % 4]) continue;
        (inside[k] ? exits : entries).push(k);
      }
      // With two of each the middle says which pair of corners is joined.
      const joined =
        corners.reduce((sum, value) => sum + value, 0) / 4 > threshold;
      for (const exit of exits) {
        const entry = entries.reduce((best, k) => {
          const turn = (k - exit + 4) % 4;
          const other = (best - exit + 4) % 4;
          return turn < other === joined ? k : best;
        });
        next.set(cross(...edges[exit]), cross(...edges[entry]));
      }
    }
  }

  const lines = [];
  while (next.size) {
    const line = [];
    let [name] = next.keys();
    while (next.has(name)) {
      line.push(points.get(name));
      const following = next.get(name);
      next.delete(name);
      name = following;
    }
    lines.push(line);
  }
  return lines;
}
