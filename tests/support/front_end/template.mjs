// node template.mjs VISIT
// VISIT is a JSON object: url, pack, folder (of the screenshots), nodes2 (draw with Nodes 2.0), workflows, run (those of
// them that are run), seconds (at most for one run), help (a node type whose help page is opened).
// Opens workflows of a pack from ComfyUI's template browser, runs them and prints as JSON what a user would see: nodes,
// widgets, dialogs, pictures, reports and the help page. The first one runs as it is saved, the others with few steps.
// It judges nothing; the test does.
import { join } from "node:path";
import { DIALOG, withFrontEnd } from "./front_end.mjs";

const { url, pack, folder, nodes2, workflows, run: runs, seconds, help } = JSON.parse(process.argv[2]);
const MENU = ".comfy-menu-button-wrapper, [data-testid=comfy-menu-button]"; // front end 1.32, and later ones

const post = (place, said) => fetch(`${url}/api/${place}`, { method: "POST", body: JSON.stringify(said) });
const set = (name, value) => post(`settings/${name}`, value);

async function openFromTemplates(page, workflow) {
  await page.locator(MENU).first().click();
  await page.getByRole("menuitem", { name: "Browse Templates" }).click();
  const dialog = page.locator(DIALOG).filter({ has: page.locator("nav") });
  await dialog.locator("nav").getByText(pack, { exact: true }).click();
  const all = dialog.locator("[data-testid^=template-workflow-]");
  const card = dialog.getByTestId(`template-workflow-${workflow}`);
  await all.first().waitFor({ state: "visible" });
  for (let tries = 0; tries < 50 && (await card.count()) === 0; tries++) { // cards come as they are scrolled to
    await all.last().scrollIntoViewIfNeeded();
    await page.waitForTimeout(200);
  }
  await card.scrollIntoViewIfNeeded();
  await card.locator("img").first().waitFor({ state: "visible" });
  await page.waitForFunction((name) => {
    const picture = document.querySelector(`[data-testid="template-workflow-${name}"] img`);
    return picture?.complete && picture.naturalWidth > 0;
  }, workflow);
  const cards = await all.evaluateAll((found) =>
    found.map((one) => one.dataset.testid.replace("template-workflow-", "")),
  );
  await page.screenshot({ path: join(folder, `${workflow}_templates.png`) });
  await card.click();
  await dialog.waitFor({ state: "hidden" });
  await page.waitForFunction((name) => window.app.extensionManager.workflow.activeWorkflow?.filename === name, workflow);
  await page.waitForTimeout(1500); // a dialog about missing nodes or models comes after the graph
  return cards;
}

// Runs in the page: everything that is drawn, as plain data.
function drawnGraph(dialog) {
  const { app, LiteGraph } = window;
  const { scale, offset } = app.canvas.ds;
  const canvas = app.canvas.canvas.getBoundingClientRect();
  // The box of a node that Nodes 2.0 has drawn, in the graph's own units; null on the classic canvas.
  const drawn = (id) => {
    const box = document.querySelector(`[data-node-id="${id}"]`)?.getBoundingClientRect();
    if (!box) return null;
    const [x, y] = [(box.x - canvas.x) / scale - offset[0], (box.y - canvas.y) / scale - offset[1]];
    return [x, y, box.width / scale, box.height / scale];
  };
  // Whether a box in the graph's own units lies whole on the canvas.
  const inView = ([x, y, width, height]) => {
    const [left, top] = [(x + offset[0]) * scale, (y + offset[1]) * scale];
    return left >= 0 && top >= 0 && left + width * scale <= canvas.width && top + height * scale <= canvas.height;
  };
  const folded = (one) => Boolean(one.flags?.collapsed); // shown by its title alone
  const height = (one) => (folded(one) ? 0 : one.size[1]); // below the title
  const drawnPictures = (id) => [...document.querySelectorAll(`[data-node-id="${id}"] img`)];
  const node = (one) => ({
    id: Number(one.id), // a number in front end 1.32, a text in later ones
    type: one.type,
    title: one.title,
    registered: one.type in LiteGraph.registered_node_types,
    failed: Boolean(one.has_errors),
    box: [one.pos[0], one.pos[1] - LiteGraph.NODE_TITLE_HEIGHT, one.size[0], height(one) + LiteGraph.NODE_TITLE_HEIGHT],
    drawn: drawn(one.id),
    needs: folded(one) ? 0 : one.computeSize()[1],
    widgets: Object.fromEntries((one.widgets ?? []).map((widget) => [widget.name, widget.value])),
    unlinked: (one.inputs ?? []).filter((slot) => slot.link == null && !slot.widget && slot.shape !== 7).map((slot) => slot.name),
    pictures: (drawn(one.id) ? drawnPictures(one.id) : (one.imgs ?? [])).map((image) => [image.naturalWidth, image.naturalHeight]),
    report: one.widgets?.find((widget) => widget.name === "modular_lora_report")?.value || null,
    outputs: (one.outputs ?? []).map((slot) => slot.label ?? slot.localized_name ?? slot.name),
  });
  const placed = (one) => ({ ...one, inView: inView(one.drawn ?? one.box) });
  return {
    nodes: app.graph.nodes.map(node).map(placed),
    links: app.graph.links.size,
    dialogs: [...document.querySelectorAll(dialog)].map((one) => one.innerText.slice(0, 500)),
  };
}

// Training takes minutes, sampling half a minute; few steps and prompts take the same way.
const FEW = {
  steps: 5,
  max_train_steps: 4,
  train_batch_size: 2,
  sample_every_n_steps: 4,
  denoising_steps: 2,
  pool_size: 6,
  synonyms: "twemoji, racing car",
  preserve: "twemoji, cat face",
};

function shorten(few) {
  for (const widget of window.app.graph.nodes.flatMap((one) => one.widgets ?? [])) {
    if (widget.name in few) widget.value = few[widget.name];
  }
}

async function run(page) {
  await page.evaluate(() => {
    window.modularLoraRun = { state: "queued", errors: [] };
    const note = (name, state) =>
      window.app.api.addEventListener(name, ({ detail }) => {
        window.modularLoraRun.state = state;
        if (detail?.exception_message) window.modularLoraRun.errors.push(detail.exception_message);
      });
    note("execution_success", "success");
    note("execution_error", "error");
    note("execution_interrupted", "interrupted");
  });
  await page.keyboard.press("Control+Enter");
  await page.waitForFunction(
    (dialog) => window.modularLoraRun.state !== "queued" || document.querySelector(dialog),
    DIALOG,
    { timeout: Number(seconds) * 1000 },
  );
  await page.waitForTimeout(2000); // pictures are fetched after the last event
  return page.evaluate(() => window.modularLoraRun);
}

async function shoot(page, name) {
  await page.evaluate(() => window.app.extensionManager.command.execute("Comfy.Canvas.FitView"));
  await page.waitForTimeout(1000);
  await page.screenshot({ path: join(folder, `${name}.png`) });
}

// A click on a node's title, then on "Node Info" in the small bar above it: what is read there.
async function readHelp(page, type) {
  const [x, y] = await page.evaluate((type) => {
    const { canvas, graph } = window.app;
    const node = graph.nodes.find((one) => one.type === type);
    const { left, top } = canvas.canvas.getBoundingClientRect();
    const { scale, offset } = canvas.ds;
    return [left + (node.pos[0] + 60 + offset[0]) * scale, top + (node.pos[1] - 15 + offset[1]) * scale];
  }, type);
  await page.mouse.click(x, y);
  await page.getByTestId("info-button").first().click();
  const shown = page.locator(".node-help-content");
  await shown.getByRole("heading").first().waitFor({ state: "visible" });
  await page.screenshot({ path: join(folder, `${type}_help.png`) });
  return shown.innerText();
}

// On its very first start the front end opens the template browser by itself; we want to open it.
await set("Comfy.TutorialCompleted", true);
await set("Comfy.VueNodes.Enabled", nodes2);
await post("free", { unload_models: true, free_memory: true }); // what an earlier visit ran is to run again
const result = await withFrontEnd(url, async (page) => {
  const complaints = [];
  page.on("pageerror", (error) => complaints.push(String(error)));
  const seen = {};
  for (const workflow of workflows) {
    const cards = await openFromTemplates(page, workflow);
    const opened = await page.evaluate(drawnGraph, DIALOG); // in the view that the front end itself has chosen
    await shoot(page, `${workflow}_loaded`);
    seen[workflow] = { cards, opened, loaded: await page.evaluate(drawnGraph, DIALOG) };
    if (!runs.includes(workflow)) continue;
    if (workflow !== workflows[0]) await page.evaluate(shorten, FEW);
    seen[workflow].outcome = await run(page);
    await shoot(page, `${workflow}_ran`);
    seen[workflow].ran = await page.evaluate(drawnGraph, DIALOG);
    if (help && workflow === workflows[0]) seen[workflow].help = await readHelp(page, help);
  }
  return { seen, complaints };
});
console.log(JSON.stringify(result, null, 1));
