// The page: takes an image, shows its outline and says what it means.

import { measure } from "./measure.js";
import { ImageError, mapSize, Network, readImage } from "./network.js";
import { findOutline } from "./outline.js";

// As in the overlays of Python: told apart from skin and lesions by people with
// any colour vision, on a dark rim.
const LINE = "#ffd600";
const RIM = "rgb(0 0 0 / 60%)";

const $ = (id) => document.getElementById(id);

let page;
let network;
// The image shown: {name, bitmap, result}; null before the first.
let shown = null;
// Whoever asks last is shown, however long the others take.
let request = 0;
// The runtime takes one image at a time.
let queue = Promise.resolve();

/** Returns what is on the screen, for tests. */
export function current() {
  if (!shown) return null;
  const threshold = Number($("threshold").value);
  return {
    name: shown.name,
    precision: precision(),
    threshold,
    ...shown.result,
    ...measure(shown.result.probability, threshold),
  };
}

// ------------------------------------------------------------------- showing

function say(text) {
  $("status").textContent = text;
}

function complain(text) {
  $("problem").textContent = text;
}

function percent(share) {
  return `${(100 * share).toFixed(1)} %`;
}

function bytes(count) {
  return count < 1e6
    ? `${Math.round(count / 1e3)} kB`
    : `${(count / 1e6).toFixed(1)} MB`;
}

/** Draws the image and its outline, and says what there is. */
function show() {
  const threshold = Number($("threshold").value);
  $("threshold-value").textContent = threshold.toFixed(2);
  $("threshold").setAttribute("aria-valuetext", threshold.toFixed(2));
  $("reset").disabled = !page || threshold === Number(page.threshold.toFixed(2));
  if (!shown) return;
  const { name, result } = shown;
  const { share, confidence } = measure(result.probability, threshold);
  draw($("canvas"), shown, $("outline").checked);

  const empty = share === 0;
  $("area").textContent = percent(share);
  $("confidence").textContent = confidence.toFixed(2);
  $("confidence-of").textContent = empty
    ? "that there is none"
    : "inside the outline";
  $("time").textContent = `${Math.round(result.milliseconds)} ms`;
  $("time-of").textContent = `network ${Math.round(
    result.networkMilliseconds,
  )} ms`;
  const about = empty
    ? "no lesion found at this threshold"
    : `lesion on ${percent(share)} of the image, mean confidence ` +
      confidence.toFixed(2);
  $("canvas").setAttribute("aria-label", `${name}: ${about}`);
  return `${name}: ${about}`;
}

/** Takes what is to be shown in place of what was; null for nothing. */
function hold(next, example = null) {
  shown?.bitmap.close();
  shown = next;
  $("stage").classList.toggle("empty", !shown);
  $("invitation").hidden = Boolean(shown);
  $("canvas").hidden = !shown;
  $("outline").disabled = !shown;
  $("save").disabled = !shown;
  for (const button of $("examples").querySelectorAll("button")) {
    button.setAttribute("aria-pressed", String(button === example));
  }
}

/** Says what is wrong with an image, beside no picture and number of another. */
function fail(text) {
  hold(null);
  for (const id of ["area", "confidence", "time"]) $(id).textContent = "–";
  $("time-of").textContent = "";
  say("");
  complain(text);
}

function draw(canvas, { bitmap, result }, outlined) {
  const threshold = Number($("threshold").value);
  const { width, height } = mapSize(bitmap);
  if (canvas.width !== width || canvas.height !== height) {
    canvas.width = width;
    canvas.height = height;
  }
  const context = canvas.getContext("2d", { alpha: false });
  context.fillRect(0, 0, width, height);
  context.imageSmoothingQuality = "high";
  context.drawImage(bitmap, 0, 0, width, height);
  if (!outlined) return;
  const path = new Path2D();
  for (const line of findOutline(result.map, page.size, threshold)) {
    line.forEach(([x, y], i) => {
      path[i ? "lineTo" : "moveTo"](x * width, y * height);
    });
    path.closePath();
  }
  const thick = Math.max(1.5, Math.max(width, height) / 240);
  context.lineJoin = "round";
  for (const [colour, share] of [
    [RIM, 1.9],
    [LINE, 1],
  ]) {
    context.strokeStyle = colour;
    context.lineWidth = thick * share;
    context.stroke(path);
  }
}

// ---------------------------------------------------------------- segmenting

function precision() {
  return (
    document.querySelector("input[name=precision]:checked")?.value ??
    page.networks[0].id
  );
}

function inTurn(work) {
  const done = queue.then(work);
  queue = done.catch(() => {});
  return done;
}

/** Segments an image, or gives null when another was asked for since. */
async function segment(bitmap, mine) {
  for (;;) {
    const id = precision();
    const result = await inTurn(() =>
      mine === request ? network.segment(bitmap, id) : null,
    );
    if (mine !== request) return null;
    if (id === precision()) return result;
  }
}

/**
 * Takes an image and shows it outlined, unless another was asked for since.
 * @param {string} name for people.
 * @param {() => Promise<ImageBitmap>} read
 * @param {Element} example its button, if it is one.
 */
async function take(name, read, example = null) {
  const mine = ++request;
  complain("");
  say(`Outlining ${name} …`);
  $("stage").setAttribute("aria-busy", "true");
  let bitmap;
  try {
    bitmap = await read();
    const result = await segment(bitmap, mine);
    if (!result) {
      bitmap.close();
      return;
    }
    hold({ name, bitmap, result }, example);
    say(`${show()}.`);
  } catch (error) {
    bitmap?.close();
    if (mine !== request) return;
    fail(
      error instanceof ImageError
        ? `${name} ${error.message}`
        : `${name} could not be outlined: ${error.message}`,
    );
  } finally {
    if (mine === request) $("stage").removeAttribute("aria-busy");
  }
}

function takeFile(file) {
  if (!network) complain("The network is still loading; try again.");
  else if (file) take(file.name || "Pasted image", () => readImage(file));
}

async function again() {
  // An image on its way notices by itself.
  if (!shown || $("stage").hasAttribute("aria-busy")) return;
  const mine = ++request;
  const { name, bitmap } = shown;
  try {
    const result = await segment(bitmap, mine);
    if (!result) return;
    shown.result = result;
    say(`${show()}.`);
  } catch (error) {
    if (mine === request) {
      fail(`${name} could not be outlined: ${error.message}`);
    }
  }
}

// ------------------------------------------------------------------ controls

function listenForFiles() {
  const stage = $("stage");
  $("choose").addEventListener("click", () => $("file").click());
  stage.addEventListener("click", () => {
    // The button says the same to a keyboard.
    if (network && stage.classList.contains("empty")) $("file").click();
  });
  for (const id of ["file", "shot"]) {
    $(id).addEventListener("change", ({ target }) => {
      takeFile(target.files[0]);
      // So that the same file can be chosen again.
      target.value = "";
    });
  }
  let depth = 0;
  const over = (by) => {
    depth = Math.max(0, depth + by);
    stage.classList.toggle("over", depth > 0);
  };
  addEventListener("dragenter", (event) => {
    event.preventDefault();
    over(1);
  });
  addEventListener("dragleave", () => over(-1));
  addEventListener("dragover", (event) => event.preventDefault());
  addEventListener("drop", (event) => {
    event.preventDefault();
    over(-depth);
    const [file] = event.dataTransfer.files;
    if (file) takeFile(file);
    else complain("What was dropped is not a file; save the image first.");
  });
  addEventListener("paste", ({ clipboardData }) => {
    const [file] = clipboardData.files;
    if (file) takeFile(file);
  });
}

function listenForSettings() {
  const slider = $("threshold");
  slider.addEventListener("input", show);
  // Said once it stays, not at every step.
  slider.addEventListener("change", () => shown && say(`${show()}.`));
  $("reset").addEventListener("click", () => {
    slider.value = page.threshold;
    slider.focus();
    const text = show();
    if (text) say(`${text}.`);
  });
  $("outline").addEventListener("change", show);
  $("precision").addEventListener("change", again);
  $("save").addEventListener("click", save);
}

function save() {
  const stem = shown.name.replace(/\.[^.]*$/, "").replace(/[^\w.-]+/g, "-");
  const canvas = document.createElement("canvas");
  draw(canvas, shown, true);
  canvas.toBlob((blob) => {
    if (!blob) {
      complain("The overlay could not be made; the image may be too large.");
      return;
    }
    const link = document.createElement("a");
    link.href = URL.createObjectURL(blob);
    link.download = `${stem || "image"}-outline.png`;
    link.click();
    // Not at once: the browser may not have begun to read it.
    setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
    say(`Saved ${link.download}.`);
  }, "image/png");
}

function listenForTheme() {
  const button = $("theme");
  const root = document.documentElement;
  const system = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () =>
    root.dataset.theme ? root.dataset.theme === "dark" : system.matches;
  const label = () => {
    button.textContent = isDark() ? "Light theme" : "Dark theme";
  };
  button.addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    try {
      localStorage.setItem("kdseg-theme", root.dataset.theme);
    } catch {
      // Storage is blocked: for this visit, then.
    }
    label();
  });
  system.addEventListener("change", label);
  label();
}

function listenForCamera() {
  const dialog = $("camera-dialog");
  const video = $("video");
  let opened = 0;
  const stop = () => {
    opened += 1;
    for (const track of video.srcObject?.getTracks() ?? []) track.stop();
    video.srcObject = null;
    $("take").disabled = true;
  };
  $("camera").addEventListener("click", async () => {
    if (!navigator.mediaDevices?.getUserMedia || !dialog.showModal) {
      // Not on plain http; phones have a camera behind a file input too.
      $("shot").click();
      return;
    }
    $("camera-problem").textContent = "";
    dialog.showModal();
    const mine = ++opened;
    try {
      const stream = await navigator.mediaDevices.getUserMedia({
        video: {
          facingMode: "environment",
          width: { ideal: 1920 },
          height: { ideal: 1080 },
        },
      });
      if (mine !== opened) {
        for (const track of stream.getTracks()) track.stop();
        return;
      }
      video.srcObject = stream;
      await video.play();
      $("take").disabled = false;
      $("take").focus();
    } catch (error) {
      if (mine !== opened) return;
      $("camera-problem").textContent =
        {
          NotAllowedError:
            "The camera is not allowed here; allow it in the browser's " +
            "settings for this page, or choose a file.",
          NotFoundError: "No camera was found; choose a file.",
          NotReadableError: "Another program is using the camera.",
        }[error.name] ?? `The camera does not start: ${error.message}`;
    }
  });
  $("take").addEventListener("click", async () => {
    const bitmap = await createImageBitmap(video);
    dialog.close();
    take("Camera picture", async () => bitmap);
  });
  $("close-camera").addEventListener("click", () => dialog.close());
  dialog.addEventListener("close", stop);
}

// ------------------------------------------------------------------- loading

function describe() {
  const threshold = page.threshold.toFixed(2);
  $("own-threshold").textContent = threshold;
  $("threshold").value = page.threshold;
  if (page.parameters) {
    const count = page.parameters.toLocaleString("en");
    $("lead").textContent =
      `A network of ${count} parameters that runs in this browser.`;
  }
  $("runtime").textContent = `ONNX Runtime Web ${page.runtime.version}`;
  const row = (key, value) => {
    const line = $("about").tBodies[0].insertRow();
    const head = document.createElement("th");
    head.scope = "row";
    head.textContent = key;
    line.append(head);
    line.insertCell().textContent = value;
  };
  for (const [key, value] of page.about) row(key, value);

  for (const { file, title } of page.examples) {
    const button = document.createElement("button");
    button.type = "button";
    button.disabled = true;
    button.setAttribute("aria-pressed", "false");
    const image = document.createElement("img");
    image.src = file;
    image.alt = "";
    const text = document.createElement("span");
    text.textContent = title;
    button.append(image, text);
    button.addEventListener("click", () => {
      const read = async () => {
        const response = await fetch(file);
        if (!response.ok) throw new Error(`HTTP ${response.status}`);
        return readImage(await response.blob());
      };
      take(title, read, button);
    });
    const item = document.createElement("li");
    item.append(button);
    $("examples").append(item);
  }

  if (page.networks.length < 2) return;
  const choices = $("precision").querySelector(".choices");
  page.networks.forEach((entry, i) => {
    const label = document.createElement("label");
    const input = document.createElement("input");
    Object.assign(input, { type: "radio", name: "precision", value: entry.id });
    input.checked = i === 0;
    const text = document.createElement("span");
    const size = document.createElement("small");
    text.textContent = entry.title;
    size.textContent = bytes(entry.bytes);
    text.append(size);
    label.append(input, text);
    choices.append(label);
  });
  $("precision").hidden = false;
}

async function load() {
  const response = await fetch("page.json");
  if (!response.ok) throw new Error(`page.json: HTTP ${response.status}`);
  page = await response.json();
  describe();
  show();
  if (typeof WebAssembly !== "object") {
    throw new Error("this browser has no WebAssembly");
  }
  network = await Network.load(page, (share) => {
    $("progress").value = share;
    if (share >= 1) {
      $("loading-text").textContent = "Starting the network";
      $("progress").removeAttribute("value");
    }
  });
  $("loading").hidden = true;
  $("stage").classList.add("ready");
  const waiting = ["choose", "camera", "threshold"].map($);
  for (const control of [
    ...waiting,
    ...$("examples").querySelectorAll("button"),
  ]) {
    control.disabled = false;
  }
  say("Ready.");
}

/** Keeps the page for use without a network, and takes newer ones. */
async function keep() {
  // Not on plain http; the page then works as long as it is open.
  if (!navigator.serviceWorker) return;
  let asked = false;
  navigator.serviceWorker.addEventListener("controllerchange", () => {
    if (asked && !shown) location.reload();
  });
  const registration = await navigator.serviceWorker.register("sw.js");
  const renew = () => {
    // A newer version waits for all tabs to close; where nothing would be lost,
    // it need not. A first version has nothing to wait for.
    if (registration.waiting && registration.active && !shown) {
      asked = true;
      registration.waiting.postMessage("take over");
    }
  };
  registration.addEventListener("updatefound", () => {
    registration.installing?.addEventListener("statechange", renew);
  });
  renew();
}

listenForTheme();
listenForFiles();
listenForSettings();
listenForCamera();
try {
  await load();
  // What fails here costs the offline use, and nothing else.
  keep().catch((error) => console.warn(`Not kept for offline use: ${error}`));
} catch (error) {
  $("loading").hidden = true;
  complain(`The network could not be loaded: ${error.message}`);
}
