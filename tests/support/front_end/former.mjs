// node former.mjs VISIT
// VISIT is a JSON object: url, folder (of the screenshot), nodes2 (draw with Nodes 2.0), workflow (the content of a saved
// file).
// Opens a saved workflow as dropping its file on the page does, and prints as JSON what the front end would queue of it,
// and what stands on its nodes. It judges nothing; the test does.
import { join } from "node:path";
import { withFrontEnd } from "./front_end.mjs";

const { url, folder, nodes2, workflow } = JSON.parse(process.argv[2]);

async function set(name, value) {
  await fetch(`${url}/api/settings/${name}`, { method: "POST", body: JSON.stringify(value) });
}

await set("Comfy.TutorialCompleted", true);
await set("Comfy.VueNodes.Enabled", nodes2);
const result = await withFrontEnd(url, async (page) => {
  const complaints = [];
  page.on("pageerror", (error) => complaints.push(String(error)));
  await page.evaluate((saved) => window.app.loadGraphData(saved), workflow);
  await page.waitForTimeout(1500);
  await page.evaluate(() => window.app.extensionManager.command.execute("Comfy.Canvas.FitView"));
  await page.waitForTimeout(1000);
  await page.screenshot({ path: join(folder, "former.png") });
  const seen = await page.evaluate(async () => ({
    queued: (await window.app.graphToPrompt()).output,
    sockets: Object.fromEntries(
      window.app.graph.nodes.map((one) => [one.type, one.inputs.filter((slot) => !slot.widget).map((slot) => slot.name)]),
    ),
  }));
  return { ...seen, complaints };
});
console.log(JSON.stringify(result, null, 1));
