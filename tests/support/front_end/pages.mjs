// node pages.mjs ADDRESS...
// Opens pages and prints as JSON what is read on each, and whether words on it became part of it.
import { withPage } from "./front_end.mjs";

const result = await withPage(async (page) => {
  const seen = [];
  for (const address of process.argv.slice(2)) {
    const complaints = [];
    page.removeAllListeners("pageerror");
    page.on("pageerror", (error) => complaints.push(String(error)));
    await page.goto(address);
    await page.waitForTimeout(500);
    const found = await page.evaluate(() => ({
      text: document.body.innerText,
      ran: window.modularLoraRan ?? null,
      foreign: [...document.querySelectorAll('[src="x"], [onerror], script')].map((one) => one.outerHTML),
    }));
    const beyond = {}; // width of the window -> pixels of the page that are beyond it
    for (const width of [400, 800, 1280, 1920]) {
      await page.setViewportSize({ width, height: 800 });
      beyond[width] = await page.evaluate(() => document.documentElement.scrollWidth - window.innerWidth);
    }
    seen.push({ ...found, complaints, beyond });
  }
  return seen;
});
console.log(JSON.stringify(result, null, 1));
