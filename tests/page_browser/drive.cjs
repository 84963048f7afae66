// Uses a page as a person would, in a real Chromium, and says what happened.
//
//   NODE_PATH=DIR/node_modules node drive.cjs WORK.json
//
// WORK.json: {page, newer, newerThreshold, chromium, profile, out, shots, files:
// {name: path}}; newer is a page that replaces the first. Whatever it finds goes into OUT/seen.json and OUT/NAME.f32, for page_test.py
// to judge; shots, if given, is a folder for pictures to look at.

const fs = require("node:fs");
const http = require("node:http");
const path = require("node:path");
const { chromium } = require("playwright-core");

const TYPES = {
  ".css": "text/css",
  ".html": "text/html",
  ".jpg": "image/jpeg",
  ".js": "text/javascript",
  ".json": "application/json",
  ".svg": "image/svg+xml",
  ".txt": "text/plain",
};
const work = JSON.parse(fs.readFileSync(process.argv[2], "utf8"));
const seen = { console: [], requests: [], files: {}, focus: [] };

/** Serves a folder as the plainest web server would. */
function serve(root, port = 0) {
  const server = http.createServer((request, response) => {
    const name = new URL(request.url, "http://x").pathname.slice(1);
    const file = path.join(root, name || "index.html");
    fs.readFile(file, (error, content) => {
      response.writeHead(error ? 404 : 200, {
        "Content-Type":
          TYPES[path.extname(file)] ?? "application/octet-stream",
      });
      response.end(error ? "" : content);
    });
  });
  return new Promise((resolve) => {
    server.listen(port, "127.0.0.1", () => resolve(server));
  });
}

const stop = (server) =>
  new Promise((resolve) => {
    server.close(resolve);
    server.closeAllConnections();
  });

/** Writes the probability that is shown, and returns the rest of it. */
async function read(page, name) {
  const { probability, ...rest } = await page.evaluate(async () => {
    const { current } = await import(new URL("app.js", document.baseURI).href);
    const { map, probability, ...rest } = current();
    const bytes = new Uint8Array(probability.buffer);
    let text = "";
    for (let i = 0; i < bytes.length; i += 32768) {
      text += String.fromCharCode(...bytes.subarray(i, i + 32768));
    }
    return { ...rest, probability: btoa(text) };
  });
  fs.writeFileSync(
    path.join(work.out, `${name}.f32`),
    Buffer.from(probability, "base64"),
  );
  const text = (id) => page.locator(`#${id}`).textContent();
  seen.files[name] = {
    ...rest,
    status: await text("status"),
    area: await text("area"),
    shownConfidence: await text("confidence"),
    label: await page.locator("#canvas").getAttribute("aria-label"),
  };
}

/** Returns what is on the page beside an error. */
async function left(page) {
  const numbers = [];
  for (const id of ["area", "confidence", "time", "time-of", "status"]) {
    numbers.push(await page.locator(`#${id}`).textContent());
  }
  return {
    numbers,
    picture: await page.locator("#canvas").isVisible(),
    save: await page.locator("#save").isEnabled(),
    pressed: await page.locator("[aria-pressed=true]").count(),
  };
}

const settled = (page, text) =>
  page.waitForFunction(
    (text) =>
      !document.querySelector("#stage").hasAttribute("aria-busy") &&
      document.querySelector("#status").textContent.startsWith(text),
    text,
  );

const ready = (page) => page.locator("#stage.ready").waitFor();

async function shoot(page, name, options = {}) {
  if (!work.shots) return;
  await page.screenshot({ path: path.join(work.shots, name), ...options });
}

async function main() {
  const server = await serve(work.page);
  const { port } = server.address();
  const origin = `http://127.0.0.1:${port}`;
  const context = await chromium.launchPersistentContext(work.profile, {
    executablePath: work.chromium,
    headless: true,
    viewport: { width: 1100, height: 750 },
    colorScheme: "light",
    permissions: ["camera"],
    args: [
      "--no-sandbox",
      "--disable-gpu",
      "--disable-quic",
      "--no-first-run",
      "--disable-background-networking",
      "--disable-component-update",
      "--disable-sync",
      "--use-fake-device-for-media-stream",
    ],
  });
  context.setDefaultTimeout(120_000);
  // Of the service worker too.
  context.on("request", (request) => {
    seen.requests.push([request.method(), request.url()]);
  });
  const page = context.pages()[0] ?? (await context.newPage());
  page.on("console", (message) => {
    if (["error", "warning"].includes(message.type())) {
      seen.console.push(message.text());
    }
  });
  page.on("pageerror", (error) => seen.console.push(String(error)));

  seen.origin = origin;
  await page.goto(`${origin}/`);
  await ready(page);
  await shoot(page, "empty.png");
  seen.loading = await page.locator("#loading").isVisible();

  // Examples, by mouse.
  const examples = page.locator("#examples button");
  seen.examples = await examples.allTextContents();
  for (const [i, title] of seen.examples.entries()) {
    await examples.nth(i).click();
    await settled(page, title);
    await read(page, `example-${i}`);
  }
  await examples.nth(0).click();
  await settled(page, seen.examples[0]);
  await page.evaluate(() => scrollTo(0, 0));
  await page.mouse.move(0, 0);
  await shoot(page, "readme.png");
  await shoot(page, "light.png", { fullPage: true });

  // Files, good and bad.
  for (const [name, file] of Object.entries(work.files)) {
    await page.locator("#file").setInputFiles(file);
    const base = path.basename(file);
    await page.waitForFunction(
      (base) =>
        !document.querySelector("#stage").hasAttribute("aria-busy") &&
        ["#status", "#problem"].some((at) =>
          document.querySelector(at).textContent.startsWith(base),
        ),
      base,
    );
    const problem = await page.locator("#problem").textContent();
    if (problem) {
      seen.files[name] = { problem, ...(await left(page)) };
      await shoot(page, "problem.png");
    } else await read(page, name);
  }

  // The same by drag and drop.
  await page.evaluate(async () => {
    const { examples } = await (await fetch("page.json")).json();
    const blob = await (await fetch(examples[1].file)).blob();
    const files = new DataTransfer();
    files.items.add(new File([blob], "dropped.jpg", { type: "image/jpeg" }));
    document.body.dispatchEvent(
      new DragEvent("drop", { dataTransfer: files, bubbles: true }),
    );
  });
  await settled(page, "dropped.jpg");
  await read(page, "dropped");

  // With the keyboard alone, from the top.
  await page.reload();
  await ready(page);
  const focused = () =>
    page.evaluate(() => {
      const at = document.activeElement;
      const style = getComputedStyle(at);
      return {
        name: at.id || at.textContent.trim() || at.tagName,
        ring: style.outlineStyle !== "none" && style.outlineWidth !== "0px",
      };
    });
  const tabTo = async (name) => {
    for (let i = 0; i < 40; i++) {
      await page.keyboard.press("Tab");
      const at = await focused();
      seen.focus.push(at);
      if (at.name === name) return;
    }
    throw new Error(`Tab does not reach ${name}`);
  };
  await tabTo("choose");
  await tabTo(seen.examples[0]);
  await page.keyboard.press("Enter");
  await settled(page, seen.examples[0]);
  await tabTo("threshold");
  await page.keyboard.press("End");
  await settled(page, seen.examples[0]);
  await read(page, "highest");
  await page.keyboard.press("Shift+Tab");
  await page.keyboard.press("Enter"); // back to the network's own
  await page.waitForFunction(
    () => document.querySelector("#threshold").value === "0.5",
  );
  await page.keyboard.press("Tab");
  await page.keyboard.press("ArrowRight"); // the other weights
  await page.waitForFunction(async () => {
    const { current } = await import(new URL("app.js", document.baseURI).href);
    return current().precision === "int8";
  });
  await settled(page, seen.examples[0]);
  await read(page, "int8");
  await tabTo("outline");
  await page.keyboard.press("Space");
  seen.outline = await page.locator("#outline").isChecked();
  await page.keyboard.press("Space");
  await tabTo("save");
  const download = page.waitForEvent("download");
  await page.keyboard.press("Enter");
  seen.download = (await download).suggestedFilename();
  await (await download).saveAs(path.join(work.out, "overlay.png"));

  // Dark, and as narrow as a phone.
  await page.locator("#theme").click();
  seen.theme = await page.evaluate(() => document.documentElement.dataset.theme);
  await shoot(page, "dark.png", { fullPage: true });
  await page.setViewportSize({ width: 375, height: 812 });
  seen.overflow = await page.evaluate(
    () => document.documentElement.scrollWidth - innerWidth,
  );
  await shoot(page, "phone-dark.png", { fullPage: true });
  await page.locator("#theme").click();
  await shoot(page, "phone.png", { fullPage: true });
  await page.setViewportSize({ width: 1100, height: 750 });

  // The camera is one that Chromium draws.
  await page.locator("#camera").click();
  await page.locator("#take:enabled").waitFor();
  await shoot(page, "camera.png");
  await page.locator("#take").click();
  await settled(page, "Camera picture");
  seen.camera = await page.locator("#status").textContent();

  // What the policy is for.
  seen.outside = await page.evaluate(async () => {
    const blocked = new Promise((resolve) => {
      addEventListener("securitypolicyviolation", (event) =>
        resolve(event.effectiveDirective),
      );
    });
    await fetch("http://127.0.0.2:9/", { method: "POST" }).catch(() => {});
    return blocked;
  });
  // Chromium says so on the console, as it should.
  seen.console = seen.console.filter((text) => !text.includes("127.0.0.2"));

  // Without the server, and without any network.
  await page.evaluate(() => navigator.serviceWorker.ready);
  const [kept] = await page.evaluate(() => caches.keys());
  await stop(server);
  await context.setOffline(true);
  await page.reload();
  await ready(page);
  await page.locator("#examples button").nth(2).click();
  await settled(page, seen.examples[2]);
  await read(page, "offline");
  await context.setOffline(false);

  // A newer page takes the place of the one that was kept.
  const newer = await serve(work.newer, port);
  await page.reload();
  await page.waitForFunction(async (kept) => {
    const names = await caches.keys();
    return names.length === 1 && names[0] !== kept;
  }, kept);
  await page.waitForFunction(
    (threshold) => document.querySelector("#threshold")?.value === threshold,
    work.newerThreshold,
  );
  await ready(page);
  seen.renewed = true;

  await stop(newer);
  await context.close();
  fs.writeFileSync(
    path.join(work.out, "seen.json"),
    JSON.stringify(seen, null, 1),
  );
}

main().catch((error) => {
  console.error(error, JSON.stringify(seen.files));
  process.exit(1);
});
