// Shows what a node of this pack reports, in a read-only field on the node.
//
// A node sends its report as `text` of its output, with which the server answers in the `executed` message, in /history,
// and again for a node whose result was cached. No front end draws it for nodes of other packs. The report is always a
// field's value: names, prompts and captions in it are anybody's words, and never become HTML.
//
// It is not saved with the workflow: a file that somebody hands on must not claim a run that never was. After a reload
// of the page the reports of this browser tab's last runs come from the server's history.
import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";

const OURS = "ModularLora"; // how our node types begin
const NAME = "modular_lora_report"; // of the widget
const EVENT = "modular_lora.report"; // of the server: a report of a node without output, or what stands above one
const MOST = 64; // of the last runs that are looked through
const UNNAMED = "00000000-0000-0000-0000-000000000000"; // the id of a workflow that has none
const LINE = 16; // pixels
const LEAST = 3, TALLEST = 12; // lines that are seen without scrolling

function fieldOf(node) {
  const found = node.widgets?.find((widget) => widget.name === NAME);
  if (found) return found;
  const { widget } = app.widgets.STRING(node, NAME, ["STRING", { multiline: true }], app);
  widget.label = "report";
  widget.serialize = false; // in the workflow
  widget.options.serialize = false; // in the prompt, where it would make every run a new one
  widget.options.read_only = true; // Nodes 2.0
  widget.options.getMinHeight = () => LINE * linesOf(widget.value, node.size[0]) + 12; // the classic canvas
  const element = widget.inputEl ?? widget.element;
  if (element) {
    element.readOnly = true;
    element.placeholder = "";
    element.style.whiteSpace = "pre-wrap";
  }
  return widget;
}

// About how many lines a text takes in a node of a width in pixels.
function linesOf(text, width) {
  const characters = Math.max(20, (width - 40) / 6.5);
  const count = String(text).split("\n").reduce((sum, line) => sum + Math.max(1, Math.ceil(line.length / characters)), 0);
  return Math.min(TALLEST, Math.max(LEAST, count));
}

function show(node, text) {
  if (!node?.type?.startsWith(OURS) || typeof text !== "string" || !text) return;
  fieldOf(node).value = text;
  const [, height] = node.computeSize();
  if (height > node.size[1]) node.setSize([node.size[0], height]);
  node.setDirtyCanvas?.(true, true);
}

const reports = new WeakMap(); // node -> its report, without what was put above it

function report(node, text) {
  if (node && typeof text === "string" && text) reports.set(node, text);
  show(node, text);
}

function showOutput(node, output) {
  if (Array.isArray(output?.text)) report(node, output.text.filter((one) => typeof one === "string").join("\n\n"));
}

function showMessage({ node: place, text, above }) {
  const node = nodeAt(place);
  if (typeof above === "string" && node) show(node, [above, reports.get(node)].filter(Boolean).join("\n\n"));
  else report(node, text);
}

// A node by its place in the open workflow: "7"; "12:7" as the server names, "UUID:7" as the front end names what lies
// in a subgraph.
function nodeAt(place) {
  const steps = String(place).split(":");
  let graph = app.rootGraph ?? app.graph;
  const own = graph.subgraphs?.get(steps[0]);
  if (own) return own.getNodeById(steps[1]);
  for (const id of steps.slice(0, -1)) {
    graph = graph?.getNodeById(id)?.subgraph;
  }
  return graph?.getNodeById(steps.at(-1));
}

function showAll(outputs) {
  for (const [place, output] of Object.entries(outputs ?? {})) showOutput(nodeAt(place), output);
}

// The latest report of each node of the open workflow from the last runs of this tab.
async function showLastRuns() {
  const id = (app.rootGraph ?? app.graph)?.id;
  if (!id || id === UNNAMED || !api.clientId) return;
  const answer = await api.fetchApi(`/history?max_items=${MOST}`);
  if (!answer.ok) return;
  const runs = Object.values(await answer.json()); // the oldest first; a run leaves out what it took from the cache
  const mine = runs.filter(({ prompt }) => {
    const extra = prompt?.[3] ?? {};
    return extra.client_id === api.clientId && extra.extra_pnginfo?.workflow?.id === id;
  });
  if ((app.rootGraph ?? app.graph)?.id === id) mine.forEach(({ outputs }) => showAll(outputs));
}

const looked = new Set(); // workflows whose last runs were looked for

app.registerExtension({
  name: "ModularLora.Report",
  setup() {
    api.addEventListener(EVENT, ({ detail }) => showMessage(detail));
  },
  beforeRegisterNodeDef(type, definition) {
    if (!definition.name.startsWith(OURS)) return;
    const before = type.prototype.onExecuted;
    type.prototype.onExecuted = function (output, ...more) {
      before?.call(this, output, ...more);
      showOutput(this, output);
    };
  },
  onNodeOutputsUpdated: showAll, // another workflow's tab, a run that is opened from the queue
  async afterConfigureGraph() {
    const id = (app.rootGraph ?? app.graph)?.id;
    if (looked.has(id)) return; // the front end remembers what came since
    looked.add(id);
    try {
      await showLastRuns();
    } catch (error) {
      console.warn("Modular LoRA Guard: the last runs' reports cannot be shown:", error);
    }
  },
});
