import { app } from "../../scripts/app.js";
import { ComfyWidgets } from "../../scripts/widgets.js";

const NAME = "modular_lora_report";

function reportWidget(node) {
  const known = node.widgets?.find((widget) => widget.name === NAME);
  if (known) return known;
  const { widget } = ComfyWidgets.STRING(node, NAME, ["STRING", { multiline: true }], app);
  widget.label = "report";
  // A report belongs to one run: neither the saved workflow nor the queued prompt carries it.
  widget.serialize = false;
  widget.options.serialize = false;
  widget.element.readOnly = true;
  widget.element.setAttribute("aria-label", "report");
  return widget;
}

// Core draws a node's text output on PreviewAny alone; a report has to be seen on the node that made it.
function showReport(node, lines) {
  const widget = reportWidget(node);
  widget.value = lines.join("\n");
  const [width, height] = node.computeSize();
  node.setSize([Math.max(node.size[0], width), Math.max(node.size[1], height)]);
  node.setDirtyCanvas(true, true);
}

app.registerExtension({
  name: "modularLoraGuard.report",
  beforeRegisterNodeDef(nodeType, nodeData) {
    if (!nodeData.name.startsWith("ModularLora")) return;
    const onExecuted = nodeType.prototype.onExecuted;
    nodeType.prototype.onExecuted = function (output) {
      onExecuted?.apply(this, arguments);
      if (output?.text?.length) showReport(this, output.text);
    };
  },
});
