// node blueprints.mjs VISIT
// VISIT is a JSON object: url, folder (of the screenshots), nodes2 (draw with Nodes 2.0), blueprints (their names), nodes
// (type -> values of its widgets, the nodes beside them), values (blueprint -> values of its widgets), links (source node
// or blueprint, output, target, input), seconds (at most for the run).
// Adds subgraph blueprints by their names in the search box, as a user does, wires them, runs the graph, and prints as JSON
// what stands on them and how the run ended. It judges nothing; the test does.
import { join } from "node:path";
import { DIALOG, withFrontEnd } from "./front_end.mjs";

const visit = JSON.parse(process.argv[2]);
const { url, folder, nodes2, blueprints } = visit;
const SEARCH = ".comfy-vue-node-search-container input, [data-testid=node-search-input], [role=dialog] input[type=text]";

async function set(name, value) {
  await fetch(`${url}/api/settings/${name}`, { method: "POST", body: JSON.stringify(value) });
}

// A double click on the empty canvas, the name, a click on the first node that is listed (front end 1.32, and later ones).
async function addByName(page, name) {
  const before = await page.evaluate(() => window.app.graph.nodes.length);
  const box = page.locator(SEARCH).first();
  for (let tries = 12; tries > 0; tries--) {
    await page.keyboard.press("Escape"); // what else may be open
    await page.evaluate(() => {
      const { app } = window;
      if (app.canvas.graph !== app.graph) app.canvas.setGraph(app.graph); // a click on a subgraph has entered it
      app.canvas.draw(true, true); // so that the nodes are where the next click looks for them
    });
    await page.mouse.dblclick(800, 500);
    // a busy machine may take two clicks for two single ones
    const opened = await box.waitFor({ state: "visible", timeout: 10_000 }).then(() => true, () => false);
    if (opened) break;
  }
  await box.waitFor({ state: "visible", timeout: 1000 });
  await box.fill(name);
  await page.waitForTimeout(2000); // the list is filled as one types
  await page.screenshot({ path: join(folder, `${name}_search.png`) });
  await page.locator(".p-autocomplete-option, [data-testid=result-item]").first().click();
  await page.waitForFunction((count) => window.app.graph.nodes.length > count, before);
  await page.waitForTimeout(500);
  await page.mouse.move(1340, 250);
  await page.mouse.click(1350, 250); // in later front ends a new node hangs on the pointer until it is put down
  await page.waitForTimeout(500);
  await page.evaluate(() => {
    window.app.graph.nodes.at(-1).pos = [0, 5000]; // out of the next one's way, until all are wired
    window.app.canvas.deselectAll();
    window.app.canvas.setDirty(true, true);
  });
}

// Runs in the page: values, other nodes and links; what stands on the blueprints.
function wire({ blueprints, nodes, values, links }) {
  const { app, LiteGraph } = window;
  const named = {};
  const give = (node, wanted) => {
    for (const widget of node.widgets ?? [])
      for (const name of [widget.name, widget.label]) if (name in wanted) widget.value = wanted[name];
  };
  for (const node of app.graph.nodes) if (blueprints.includes(node.title)) named[node.title] = node;
  Object.entries(nodes).forEach(([type, wanted], i) => {
    const node = LiteGraph.createNode(type);
    node.pos = [-500, 300 * i];
    app.graph.add(node);
    give(node, wanted);
    named[type] = node;
  });
  const shown = {};
  blueprints.forEach((name, i) => {
    const node = named[name];
    if (!node) return;
    node.pos = [500 * i, 0];
    give(node, values[name] ?? {});
    shown[name] = {
      subgraph: Boolean(node.subgraph),
      inner: node.subgraph?.nodes.map((one) => [one.type, one.type in LiteGraph.registered_node_types]),
      inputs: (node.inputs ?? []).map((slot) => slot.label ?? slot.name),
      outputs: (node.outputs ?? []).map((slot) => slot.label ?? slot.name),
      widgets: (node.widgets ?? []).map((widget) => widget.label ?? widget.name),
    };
  });
  for (const [source, output, target, input] of links) {
    const [from, to] = [named[source], named[target]];
    const slot = (slots, name) => slots.findIndex((one) => one.name === name);
    if (!from.connect(slot(from.outputs, output), to, slot(to.inputs, input))) throw new Error(`${source} ${output}`);
  }
  return shown;
}

await set("Comfy.TutorialCompleted", true);
await set("Comfy.VueNodes.Enabled", nodes2);
const result = await withFrontEnd(url, async (page) => {
  const complaints = [];
  page.on("pageerror", (error) => complaints.push(String(error)));
  await page.evaluate(() => window.app.graph.clear());
  for (const name of blueprints) await addByName(page, name);
  const shown = await page.evaluate(wire, visit);
  await page.evaluate(() => window.app.extensionManager.command.execute("Comfy.Canvas.FitView"));
  await page.waitForTimeout(1000);
  await page.screenshot({ path: join(folder, "blueprints.png") });
  await page.evaluate(() => {
    window.modularLoraRun = { state: "queued", errors: [] };
    for (const end of ["success", "error", "interrupted"])
      window.app.api.addEventListener(`execution_${end}`, ({ detail }) => {
        window.modularLoraRun.state = end;
        if (detail?.exception_message) window.modularLoraRun.errors.push(detail.exception_message);
      });
    return window.app.queuePrompt(0);
  });
  await page.waitForFunction(
    (dialog) => window.modularLoraRun.state !== "queued" || document.querySelector(dialog),
    DIALOG,
    { timeout: visit.seconds * 1000 },
  );
  await page.waitForTimeout(2000);
  await page.screenshot({ path: join(folder, "blueprints_ran.png") });
  const dialogs = await page.evaluate((d) => [...document.querySelectorAll(d)].map((one) => one.innerText), DIALOG);
  return { shown, dialogs, complaints, run: await page.evaluate(() => window.modularLoraRun) };
});
console.log(JSON.stringify(result, null, 1));
