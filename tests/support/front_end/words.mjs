// node words.mjs URL GRAPHS
// Loads each graph of GRAPHS (a JSON file of {name: API graph}), runs it, opens every drop-down of its nodes, and prints
// as JSON what the page made of the words in it: the text that is read, and whether any of them became part of the page.
import { readFileSync } from "node:fs";
import { DIALOG, withFrontEnd } from "./front_end.mjs";

const [url, file] = process.argv.slice(2);
const graphs = JSON.parse(readFileSync(file, "utf8"));
const ENDS = ["execution_success", "execution_error", "execution_interrupted"];

async function run(page, name) {
  await page.evaluate(
    async ([name, graph, ends]) => {
      window.modularLoraRun = { state: "queued", message: "" };
      for (const end of ends)
        window.app.api.addEventListener(end, ({ detail }) => {
          window.modularLoraRun = { state: end, message: detail?.exception_message ?? "" };
        }, { once: true });
      await window.app.loadApiJson(graph, name);
      await window.app.extensionManager.command.execute("Comfy.Canvas.FitView");
      await window.app.queuePrompt(0);
    },
    [name, graphs[name], ENDS],
  );
  await page.waitForFunction(() => window.modularLoraRun.state !== "queued");
  await page.waitForTimeout(2000); // reports are drawn and pictures fetched after the last event
}

// Everything that is read on the page, in shadow roots and fields too.
function read(dialog) {
  const fields = [...document.querySelectorAll("textarea, input")].map((one) => one.value);
  const reports = window.app.graph.nodes.flatMap((node) =>
    (node.widgets ?? []).filter((widget) => widget.name === "modular_lora_report").map((widget) => widget.value),
  );
  return {
    ...window.modularLoraRun,
    reports: reports.length,
    text: [document.body.innerText, ...fields].join("\n"),
    ran: window.modularLoraRan ?? null,
    foreign: [...document.querySelectorAll('[src="x"], [onerror], [href^="https://elsewhere"]')]
      .filter((one) => one.textContent !== one.getAttribute("href")) // an address that is read is what it says
      .map((one) => one.outerHTML),
    dialogs: document.querySelectorAll(dialog).length,
  };
}

// A drop-down of a node as a click on it opens it.
async function openDropDowns(page) {
  const count = await page.evaluate(() => {
    const { app, LiteGraph } = window;
    let opened = 0;
    for (const node of app.graph.nodes)
      for (const widget of node.widgets ?? []) {
        if (widget.type !== "combo" || !node.type.startsWith("ModularLora")) continue;
        const event = new MouseEvent("click", { clientX: 200, clientY: 200 });
        new LiteGraph.ContextMenu(widget.options.values, { event, scale: 1 });
        opened += 1;
      }
    return opened;
  });
  await page.waitForTimeout(1000);
  const seen = await page.evaluate(read, DIALOG);
  await page.evaluate(() => {
    window.LiteGraph.closeAllContextMenus(window);
    delete window.modularLoraRan;
  });
  return { ...seen, opened: count };
}

const result = await withFrontEnd(url, async (page) => {
  const complaints = [];
  page.on("pageerror", (error) => complaints.push(String(error)));
  const seen = {};
  for (const name of Object.keys(graphs)) {
    await run(page, name);
    seen[name] = await page.evaluate(read, DIALOG);
    await page.keyboard.press("Escape");
    seen[name].menus = await openDropDowns(page);
  }
  return { seen, complaints };
});
console.log(JSON.stringify(result, null, 1));
