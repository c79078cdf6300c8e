// Gives the training nodes of a saved workflow their values by name, and lets them show their loss curve once.
//
// A workflow holds the values of a node's widgets in the widgets' order, and their names among the node's inputs. The
// inputs of the training options nodes follow from the options of the trainers, so that another version has further ones
// between them, and until there were presets all of them stood on Train Task LoRA and Train Safety LoRA themselves. Read
// by their places they would become other options' values. What a node no longer has goes onto an options node that is
// put beside it.
import { app } from "../../scripts/app.js";

const OPTIONS = {
  ModularLoraTrainTask: "ModularLoraTaskTrainingOptions",
  ModularLoraTrainSafety: "ModularLoraSafetyTrainingOptions",
};
const TYPES = new Set([...Object.keys(OPTIONS), ...Object.values(OPTIONS)]);
const PRESET = "preset", NO_PRESET = "none", MORE = "more_options";

const isSaved = (widget) => widget.serialize !== false;

// The values of a saved node by the names of its widgets; null where it does not hold the names.
function valuesOf(saved) {
  const names = (saved.inputs ?? []).filter((slot) => slot.widget).map((slot) => slot.widget.name);
  const values = saved.widgets_values;
  if (!Array.isArray(values) || !names.length || names.length !== values.length) return null;
  return Object.fromEntries(names.map((name, i) => [name, values[i]]));
}

// What to configure the node by instead, and the values that it has no widget for.
function byName(node, saved) {
  const values = valuesOf(saved);
  if (!values) return { saved, rest: {} };
  if (node.type in OPTIONS && !(PRESET in values)) values[PRESET] = NO_PRESET; // there was none
  const widgets = (node.widgets ?? []).filter(isSaved);
  const names = new Set(widgets.map((widget) => widget.name));
  const rest = Object.fromEntries(Object.entries(values).filter(([name]) => !names.has(name)));
  const inputs = saved.inputs.filter((slot) => !(slot.widget?.name in rest) || slot.link != null);
  for (const slot of inputs) if (slot.widget?.name in rest) delete slot.widget; // what is linked stays, as a socket
  const ordered = widgets.map((widget) => (widget.name in values ? values[widget.name] : widget.value));
  return { saved: { ...saved, inputs, widgets_values: ordered }, rest };
}

function asToml(name, value) {
  const lines = typeof value === "string" && value.includes("\n") ? value.split("\n") : value;
  return `${name} = ${JSON.stringify(lines)}`;
}

// Sets the widgets of an options node; what it has no widget for becomes a line that the server refuses by its name.
function give(node, values) {
  const strange = [];
  for (const [name, value] of Object.entries(values)) {
    const widget = node.widgets.find((one) => one.name === name);
    if (widget) widget.value = typeof value === "boolean" ? (value ? "yes" : "no") : value;
    else strange.push(asToml(name, value));
  }
  const more = node.widgets.find((one) => one.name === MORE);
  if (strange.length) more.value = [more.value, ...strange].filter(Boolean).join("\n");
}

function putBeside(node, values) {
  if (!node.graph) return; // not one that stays
  const made = window.LiteGraph.createNode(OPTIONS[node.type]);
  made.pos = [node.pos[0], node.pos[1] + node.size[1] + 60];
  node.graph.add(made);
  give(made, values);
  made.connect(0, node, node.findInputSlot("options"));
}

// Nodes 2.0 of front end 1.58 goes on showing the last image of the progress beside the image that the node answers
// with, which is the same loss curve. Its store alone can drop it; where there is none of that name, both stay.
function dropProgressImage(node) {
  const stores = document.getElementById("vue-app")?.__vue_app__?.config.globalProperties.$pinia?._s;
  const inside = node.graph && node.graph !== (app.rootGraph ?? app.graph);
  stores?.get("nodeOutput")?.revokePreviewsByLocatorId?.(inside ? `${node.graph.id}:${node.id}` : String(node.id));
}

app.registerExtension({
  name: "ModularLora.Training",
  beforeRegisterNodeDef(type, definition) {
    if (!TYPES.has(definition.name)) return;
    const before = type.prototype.configure;
    type.prototype.configure = function (given) {
      const { saved, rest } = byName(this, given);
      before.call(this, saved);
      if (!Object.keys(rest).length) return;
      if (this.type in OPTIONS) setTimeout(() => putBeside(this, rest), 0); // once the graph has its links
      else give(this, rest);
    };
    const executed = type.prototype.onExecuted;
    type.prototype.onExecuted = function (output, ...more) {
      executed?.call(this, output, ...more);
      if (output?.images?.length && window.LiteGraph.vueNodesMode) dropProgressImage(this);
    };
  },
});
