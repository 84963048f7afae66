// The network itself: ONNX Runtime Web, one thread, all of it from this folder.

import { resizeMap, SquareResizer } from "./resize.js";

// What a tab can hold; more than any dermatoscope's camera, as in Python.
export const MAX_PIXELS = 100_000_000;
// Masks are made at the image's own size up to this, and shrunk to it above.
const MAP_PIXELS = 4_194_304;
const STRIP_PIXELS = 2_097_152;

/**
 * Fetches a file of this folder.
 * @param {string} name relative to the page.
 * @param {(bytes: number) => void} onBytes told what has come so far.
 * @return {Promise<Uint8Array>}
 */
export async function fetchBytes(name, onBytes = () => {}) {
  const response = await fetch(name);
  if (!response.ok) throw new Error(`${name}: HTTP ${response.status}`);
  if (!response.body) return new Uint8Array(await response.arrayBuffer());
  const parts = [];
  let length = 0;
  const reader = response.body.getReader();
  for (;;) {
    const { done, value } = await reader.read();
    if (done) break;
    parts.push(value);
    length += value.length;
    onBytes(length);
  }
  const bytes = new Uint8Array(length);
  let at = 0;
  for (const part of parts) {
    bytes.set(part, at);
    at += part.length;
  }
  return bytes;
}

/** A network in one or several precisions, of which one is used at a time. */
export class Network {
  /**
   * @param {object} page what page.json says.
   * @param {(share: number) => void} onProgress told how much has come.
   */
  static async load(page, onProgress) {
    const sizes = [page.runtime.bytes, ...page.networks.map((n) => n.bytes)];
    const total = sizes.reduce((sum, bytes) => sum + bytes);
    const come = sizes.map(() => 0);
    const files = [page.runtime.wasm, ...page.networks.map((n) => n.file)];
    const [ort, wasm, ...contents] = await Promise.all([
      import(new URL(page.runtime.file, document.baseURI).href),
      ...files.map((file, i) =>
        fetchBytes(file, (bytes) => {
          come[i] = bytes;
          onProgress(come.reduce((sum, value) => sum + value) / total);
        }),
      ),
    ]);
    // More threads would need headers that a plain server does not send.
    ort.env.wasm.numThreads = 1;
    ort.env.wasm.wasmBinary = wasm;
    ort.env.logLevel = "error";
    const network = new Network();
    Object.assign(network, { ort, page, sessions: new Map() });
    for (const [i, { id }] of page.networks.entries()) {
      const session = await ort.InferenceSession.create(contents[i], {
        executionProviders: ["wasm"],
      });
      network.sessions.set(id, session);
    }
    // The first runs set up memory and compile; their time would tell of nothing
    // else.
    const blank = document.createElement("canvas");
    Object.assign(blank, { width: 640, height: 480 });
    const bitmap = await createImageBitmap(blank);
    for (const { id } of page.networks) {
      for (let i = 0; i < 2; i++) await network.segment(bitmap, id);
    }
    return network;
  }

  /**
   * Runs the network on one square.
   * @param {Uint8Array} square [size, size, 3].
   * @param {string} id of the precision.
   * @return {Promise<Float32Array>} probability of lesion [size, size].
   */
  async run(square, id) {
    const { size, input, output } = this.page;
    const tensor = new this.ort.Tensor("uint8", square, [1, size, size, 3]);
    const results = await this.sessions.get(id).run({ [input]: tensor });
    return Float32Array.from(results[output].data);
  }

  /**
   * Segments an image.
   * @param {ImageBitmap} bitmap of any size up to MAX_PIXELS.
   * @param {string} id of the precision.
   * @return {Promise<object>} `map`, the probability on the network's square;
   *     `probability`, on `width` x `height`; `milliseconds` of all of it and
   *     `networkMilliseconds` of the network alone.
   */
  async segment(bitmap, id) {
    const { size } = this.page;
    const began = performance.now();
    const square = readSquare(bitmap, size);
    const ready = performance.now();
    const map = await this.run(square, id);
    const ran = performance.now();
    const { width, height } = mapSize(bitmap);
    const probability = resizeMap(map, size, width, height);
    return {
      map,
      width,
      height,
      probability,
      milliseconds: performance.now() - began,
      networkMilliseconds: ran - ready,
    };
  }
}

/**
 * Gives the size at which an image is shown and its mask made.
 * @param {{width: number, height: number}} image
 * @return {{width: number, height: number}}
 */
export function mapSize({ width, height }) {
  const scale = Math.min(1, Math.sqrt(MAP_PIXELS / (width * height)));
  return {
    width: Math.max(1, Math.round(width * scale)),
    height: Math.max(1, Math.round(height * scale)),
  };
}

function readSquare(bitmap, size) {
  const { width, height } = bitmap;
  // Strip by strip: phones refuse a canvas of a camera's size.
  const rows = Math.max(1, Math.min(height, Math.floor(STRIP_PIXELS / width)));
  const canvas = document.createElement("canvas");
  canvas.width = width;
  canvas.height = rows;
  const context = canvas.getContext("2d", {
    alpha: false,
    willReadFrequently: true,
  });
  const resizer = new SquareResizer(width, height, size);
  for (let top = 0; top < height; top += rows) {
    const count = Math.min(rows, height - top);
    // Whatever is transparent lies on black, not on the strip before.
    context.fillRect(0, 0, width, count);
    context.drawImage(bitmap, 0, top, width, count, 0, 0, width, count);
    resizer.add(context.getImageData(0, 0, width, count).data);
  }
  return resizer.finish();
}

/**
 * Reads an image as a person sees it: turned as its EXIF data say, colours as
 * stored.
 * @param {Blob} blob
 * @return {Promise<ImageBitmap>}
 */
export async function readImage(blob) {
  const limit = MAX_PIXELS / 1e6;
  // The size first, from the head of the file: decoding needs four bytes a
  // pixel.
  const url = URL.createObjectURL(blob);
  try {
    const image = new Image();
    await new Promise((resolve, reject) => {
      image.onload = resolve;
      image.onerror = reject;
      image.src = url;
    });
    const megapixels = (image.naturalWidth * image.naturalHeight) / 1e6;
    if (megapixels > limit) {
      throw new ImageError(
        `has ${Math.round(megapixels)} million pixels, more than ${limit}; ` +
          "make it smaller first.",
      );
    }
  } catch (error) {
    throw error instanceof ImageError ? error : new ImageError(UNREADABLE);
  } finally {
    URL.revokeObjectURL(url);
  }
  try {
    return await createImageBitmap(blob, {
      imageOrientation: "from-image",
      premultiplyAlpha: "none",
      colorSpaceConversion: "none",
    });
  } catch {
    throw new ImageError(UNREADABLE);
  }
}

/** Says what is wrong with an image, to go behind its name. */
export class ImageError extends Error {}

const UNREADABLE =
  "is not an image that this browser can read. JPEG, PNG, WebP, GIF and BMP " +
  "work everywhere; save HEIC, TIFF or DICOM as one of them first.";
