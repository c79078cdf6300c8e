// Shows what a node of this pack reports, in a read-only field on the node.
//
// A node sends its report as `text` of its output, with which the server answers in the `executed` message and again for
// a node whose result was cached. No front end draws it for nodes of other packs. The report is always a field's value:
// names, prompts and captions in it are anybody's words, and never become HTML.
//
// It is not saved with the workflow: a file that somebody hands on must not claim a run that never was. The browser's tab
// keeps the latest report of each node of each workflow, for when the workflow is left and come back to, and for when
// the page is loaded anew.
import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";

const OURS = "ModularLora"; // how our node types begin
const NAME = "modular_lora_report"; // of the widget
const EVENT = "modular_lora.report"; // of the server: a report of a node without output, or what stands above one
const UNNAMED = "00000000-0000-0000-0000-000000000000"; // the id of a workflow that has none
const LINE = 16; // pixels
const LEAST = 3, TALLEST = 12; // lines that are seen without scrolling

const said = new WeakMap(); // node -> {report, run, above}: what it says itself, and of the run behind it
const renewed = new WeakSet(); // nodes of which Nodes 2.0 was made to look at their fields again

const root = () => app.rootGraph ?? app.graph;
const isOurs = (node) => Boolean(node?.type?.startsWith(OURS));

// The field

// About how many lines a text takes in a node of a width in pixels.
function linesOf(text, width) {
  const characters = Math.max(20, (width - 40) / 6.5);
  const count = String(text).split("\n").reduce((sum, line) => sum + Math.max(1, Math.ceil(line.length / characters)), 0);
  return Math.min(TALLEST, Math.max(LEAST, count));
}

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

function draw(node) {
  const { report, run, above } = said.get(node) ?? {};
  const text = [above, run, report].filter(Boolean).join("\n\n");
  if (!text && !node.widgets?.some((widget) => widget.name === NAME)) return;
  fieldOf(node).value = text;
  setTimeout(() => redraw(node, text), 100);
  const [, height] = node.computeSize();
  if (height > node.size[1]) node.setSize([node.size[0], height]);
  node.setDirtyCanvas?.(true, true);
}

// Nodes 2.0 of front end 1.32 keeps a copy of a node's fields from the first value on that changes, such as a seed after a
// run, and does not see a field that is added later; it makes the copy anew for a node that is new. Nor does it see that
// the value of a field has changed: what is read must not be out of date.
function redraw(node, text) {
  const box = document.querySelector(`[data-node-id="${CSS.escape(node.id)}"]`);
  const own = [...(box?.querySelectorAll("textarea") ?? [])].filter((one) => one.readOnly || one.disabled).at(-1);
  if (own && own.value !== text) own.value = text;
  if (!box || own || node.flags?.collapsed || renewed.has(node)) return;
  renewed.add(node);
  node.graph?.onNodeAdded?.(node);
}

// What is kept

// A node by its place in the open workflow: "7"; "12:7" as the server names, "UUID:7" as the front end names what lies
// in a subgraph.
function nodeAt(place) {
  const steps = String(place).split(":");
  let graph = root();
  const own = graph.subgraphs?.get(steps[0]);
  if (own) return own.getNodeById(steps[1]);
  for (const id of steps.slice(0, -1)) graph = graph?.getNodeById(id)?.subgraph;
  return graph?.getNodeById(steps.at(-1));
}

function everyNode() {
  const graphs = [root(), ...(root().subgraphs?.values() ?? [])];
  return graphs.flatMap((graph) => graph.nodes.filter(isOurs));
}

function keyOf(node) {
  const id = root()?.id;
  if (!id || id === UNNAMED) return null;
  return `${EVENT} ${id} ${node.graph && node.graph !== root() ? `${node.graph.id}:` : ""}${node.id}`;
}

function change(node, changes) {
  const now = { ...said.get(node), ...changes };
  said.set(node, now);
  const key = keyOf(node);
  try {
    if (key) sessionStorage.setItem(key, JSON.stringify(now));
  } catch {
    // the browser's room for it is used up: it stays on the node alone
  }
  draw(node);
}

function recall(node) {
  const kept = keyOf(node) && sessionStorage.getItem(keyOf(node));
  if (!kept || said.has(node)) return;
  said.set(node, JSON.parse(kept));
  draw(node);
}

// What comes in

function showOutput(node, output) {
  if (!isOurs(node) || !Array.isArray(output?.text)) return;
  change(node, { report: output.text.filter((one) => typeof one === "string").join("\n\n") });
}

function showMessage({ node: place, text, run, above }) {
  const node = nodeAt(place);
  if (!isOurs(node)) return;
  if (typeof above === "string") change(node, { above });
  if (typeof run === "string") change(node, { run });
  if (typeof text === "string") change(node, { report: text });
}

// What was said of the run before; the next one begins.
function forgetRun() {
  for (const node of everyNode()) {
    const { run, above } = said.get(node) ?? {};
    if (run || above) change(node, { run: "", above: "" });
  }
}

app.registerExtension({
  name: "ModularLora.Report",
  setup() {
    api.addEventListener(EVENT, ({ detail }) => showMessage(detail));
    api.addEventListener("execution_start", forgetRun);
  },
  beforeRegisterNodeDef(type, definition) {
    if (!definition.name.startsWith(OURS)) return;
    const before = type.prototype.onExecuted;
    type.prototype.onExecuted = function (output, ...more) {
      before?.call(this, output, ...more);
      showOutput(this, output);
    };
  },
  onNodeOutputsUpdated(outputs) {
    // a run that is opened from the queue
    for (const [place, output] of Object.entries(outputs ?? {})) showOutput(nodeAt(place), output);
  },
  afterConfigureGraph() {
    everyNode().forEach(recall);
  },
});
