// Opens ComfyUI's own front end in a real Chromium. playwright-core comes from the folder in MODULAR_LORA_PLAYWRIGHT.
import { mkdtempSync, rmSync } from "node:fs";
import { createRequire } from "node:module";
import { tmpdir } from "node:os";
import { join } from "node:path";

const PATIENCE = 180_000; // milliseconds; a busy machine starts the front end slowly
const FLAGS = [
  "--no-sandbox",
  "--disable-gpu",
  "--disable-quic",
  "--no-first-run",
  "--disable-background-networking",
  "--disable-component-update",
  "--disable-sync",
];

export const DIALOG = ".p-dialog, [role=dialog][data-dismissable-layer]"; // front end 1.32, and later ones

function playwright() {
  const folder = process.env.MODULAR_LORA_PLAYWRIGHT ?? process.cwd();
  return createRequire(join(folder, "package.json"))("playwright-core");
}

// Nothing moves on the page: frames are drawn by the processor here, and at 60 a second they would take more of it
// than all that is tested.
function still() {
  const style = document.createElement("style");
  style.textContent = "*, ::before, ::after { animation: none !important; transition: none !important; }";
  const place = () => document.documentElement.append(style);
  document.documentElement ? place() : document.addEventListener("DOMContentLoaded", place);
}

// Runs `use(page)` in an empty page and always closes the browser and removes its profile.
export async function withPage(use, viewport = { width: 1600, height: 1000 }) {
  const profile = mkdtempSync(join(tmpdir(), "modular-lora-chromium-"));
  const context = await playwright().chromium.launchPersistentContext(profile, {
    executablePath: process.env.MODULAR_LORA_CHROMIUM ?? "/usr/bin/chromium",
    headless: true,
    args: FLAGS,
    viewport,
  });
  try {
    await context.addInitScript(still);
    const page = context.pages()[0] ?? (await context.newPage());
    page.setDefaultTimeout(PATIENCE);
    page.setDefaultNavigationTimeout(PATIENCE);
    return await use(page);
  } finally {
    await context.close();
    rmSync(profile, { recursive: true, force: true });
  }
}

// The same on a loaded front end.
export function withFrontEnd(url, use) {
  return withPage(async (page) => {
    await page.goto(url);
    await page.waitForFunction(() => window.app?.graph && window.app.extensionManager?.workflow);
    await page.waitForSelector("#graph-canvas", { state: "visible" });
    return await use(page);
  });
}
