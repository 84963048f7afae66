// Keeps this version of the page for use without a network. It sends nothing
// anywhere: it fetches the files listed here, and answers with them.

const VERSION = "__VERSION__";
const FILES = "__FILES__"; // [name, sha256] of each
// Caches belong to the whole origin, which may hold other pages of this kind.
const PREFIX = `kdseg-page ${self.registration.scope} `;

async function digest(buffer) {
  const hash = new Uint8Array(await crypto.subtle.digest("SHA-256", buffer));
  return [...hash].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}

async function store(cache, [name, sha256]) {
  // From the browser's own cache if it holds this version, so that the runtime
  // is not downloaded twice.
  for (const mode of ["default", "reload"]) {
    const response = await fetch(name, { cache: mode });
    if (!response.ok) continue;
    if ((await digest(await response.clone().arrayBuffer())) === sha256) {
      await cache.put(new URL(name, self.registration.scope).href, response);
      return;
    }
  }
  throw new Error(`${name} is not the file of version ${VERSION}`);
}

async function install() {
  const cache = await caches.open(PREFIX + VERSION);
  try {
    await Promise.all(FILES.map((file) => store(cache, file)));
  } catch (error) {
    await caches.delete(PREFIX + VERSION);
    throw error;
  }
}

async function activate() {
  const names = await caches.keys();
  await Promise.all(
    names
      .filter((name) => name.startsWith(PREFIX) && name !== PREFIX + VERSION)
      .map((name) => caches.delete(name)),
  );
  await self.clients.claim();
}

async function answer(request) {
  const url = new URL(request.url);
  const bare = url.origin + url.pathname;
  const name = bare === self.registration.scope ? `${bare}index.html` : bare;
  try {
    const cache = await caches.open(PREFIX + VERSION);
    const kept = await cache.match(name);
    if (kept) return kept;
  } catch {
    // Storage failed; the network may not.
  }
  return fetch(request);
}

self.addEventListener("install", (event) => event.waitUntil(install()));
self.addEventListener("activate", (event) => event.waitUntil(activate()));
self.addEventListener("message", (event) => {
  if (event.data === "take over") self.skipWaiting();
});
self.addEventListener("fetch", (event) => {
  const { method, url } = event.request;
  if (method === "GET" && url.startsWith(self.registration.scope)) {
    event.respondWith(answer(event.request));
  }
});
