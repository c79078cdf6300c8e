// node reports.mjs VISIT
// VISIT is a JSON object: url, nodes2 (draw with Nodes 2.0), graph (a file with an API graph), folder (of screenshots).
// Runs the graph, and runs it again, so that its results come from the cache; goes to another workflow and back; loads
// the page anew. Prints as JSON what is read on the nodes of this pack each time, and whether any of it became HTML.
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { withFrontEnd } from "./front_end.mjs";

const { url, nodes2, graph: file, folder } = JSON.parse(process.argv[2]);
const graph = JSON.parse(readFileSync(file, "utf8"));

async function set(name, value) {
  await fetch(`${url}/api/settings/${name}`, { method: "POST", body: JSON.stringify(value) });
}

async function ready(page) {
  await page.waitForFunction(() => window.app?.graph && window.app.extensionManager?.workflow);
  await page.waitForSelector("#graph-canvas", { state: "visible" });
}

async function run(page) {
  await page.evaluate(async () => {
    window.modularLoraRun = { state: "queued", message: "" };
    for (const end of ["execution_success", "execution_error", "execution_interrupted"])
      window.app.api.addEventListener(
        end,
        ({ detail }) => (window.modularLoraRun = { state: end, message: detail?.exception_message ?? "" }),
        { once: true },
      );
    await window.app.queuePrompt(0);
  });
  await page.waitForFunction(() => window.modularLoraRun.state !== "queued", null, { timeout: 600_000 });
  await page.waitForTimeout(1500); // a front end clears what it showed of the progress after the last event
}

// Every report that is read, by the node's type: the text of its field, and whether somebody could write into it. With
// Nodes 2.0 a node's fields stand inside it, on the classic canvas all stand side by side.
function read() {
  const app = window.app;
  const reports = app.graph.nodes.flatMap((node) => {
    const widget = node.widgets?.find((one) => one.name === "modular_lora_report");
    if (!widget) return [];
    const place = document.querySelector(`[data-node-id="${CSS.escape(node.id)}"]`) ?? document;
    const shown = [...place.querySelectorAll("textarea")].find((one) => one.value && one.value === widget.value);
    const box = shown?.getBoundingClientRect();
    return [
      {
        type: node.type,
        text: shown?.value ?? null,
        fixed: Boolean(shown?.readOnly || shown?.disabled),
        drawn: Boolean(box && box.width > 20 && box.height > 10),
      },
    ];
  });
  return {
    ...window.modularLoraRun,
    reports,
    ran: window.modularLoraRan ?? null,
    foreign: [...document.querySelectorAll('[src="x"], [onerror]')].map((one) => one.outerHTML),
    id: app.graph.id,
    saved: JSON.stringify(app.graph.serialize()),
  };
}

async function look(page, name) {
  await page.evaluate(() => {
    const { canvas, graph } = window.app;
    const first = graph.nodes.find((one) => one.type === "ModularLoraGuardModel");
    canvas.ds.scale = 0.7; // near enough for fields to be drawn
    if (first) canvas.ds.offset = [140 - first.pos[0], 140 - first.pos[1]];
    canvas.setDirty(true, true);
  });
  await page.waitForTimeout(1500);
  await page.screenshot({ path: join(folder, `${name}.png`) });
  return page.evaluate(read);
}

await set("Comfy.TutorialCompleted", true);
await set("Comfy.VueNodes.Enabled", nodes2);
const result = await withFrontEnd(url, async (page) => {
  const complaints = [];
  page.on("pageerror", (error) => complaints.push(String(error)));
  const seen = {};
  await page.evaluate(async (graph) => {
    const { app } = window;
    await app.loadApiJson(graph, "reports");
    await app.loadGraphData({ ...app.graph.serialize(), id: crypto.randomUUID() }); // as a workflow that was saved has one
  }, graph);
  await run(page);
  seen.first = await look(page, "first");
  seen.prompt = await page.evaluate(async () => JSON.stringify((await window.app.graphToPrompt()).output));
  await page.evaluate(() => window.app.extensionManager.command.execute("Comfy.NewBlankWorkflow"));
  await page.waitForTimeout(2000);
  seen.elsewhere = await look(page, "elsewhere");
  await page.evaluate(() => window.app.extensionManager.command.execute("Workspace.PreviousOpenedWorkflow"));
  await page.waitForTimeout(3000);
  seen.back = await look(page, "back");
  await run(page);
  seen.cached = await look(page, "cached");
  await page.waitForTimeout(1500); // the front end keeps the workflow for the next time it is loaded
  await page.reload();
  await ready(page);
  await page.waitForTimeout(4000);
  seen.reloaded = await look(page, "reloaded");
  return { seen, complaints };
});
console.log(JSON.stringify(result, null, 1));
