// Runs the page's arithmetic in Node on what page_test.py wrote, and prints what
// came out: node arithmetic.mjs CASES.json FOLDER_OF_THE_PAGE

import fs from "node:fs";
import path from "node:path";
import { pathToFileURL } from "node:url";

const [casesFile, folder] = process.argv.slice(2);
const load = (name) => import(pathToFileURL(path.join(folder, name)).href);
const { resizeMap, SquareResizer } = await load("resize.js");
const { findOutline } = await load("outline.js");
const { measure } = await load("measure.js");

const out = [];
for (const one of JSON.parse(fs.readFileSync(casesFile, "utf8"))) {
  const { width, height, size } = one;
  if (one.kind === "image") {
    const resizer = new SquareResizer(width, height, size);
    const rgba = Uint8ClampedArray.from(one.rgba);
    // In two strips, the second shorter or longer.
    const cut = 4 * width * Math.floor(height / 3);
    if (cut) resizer.add(rgba.subarray(0, cut));
    resizer.add(rgba.subarray(cut));
    out.push([...resizer.finish()]);
  } else {
    const map = Float32Array.from(one.map);
    const resized = resizeMap(map, size, width, height);
    out.push({
      resized: [...resized],
      ...measure(resized, one.threshold),
      lines: findOutline(map, size, one.threshold),
    });
  }
}
console.log(JSON.stringify(out));
