// A small picture of per-block values: the candidate's, and its first parent's as a thin line.

const KINDS = {
  sparsities: { name: "Sparsity per block", unit: "% of prunable weights removed", scale: 100, bars: false },
  errors: { name: "Error per block", unit: "relative error of the hidden states", scale: 1, bars: true },
};
const BOX = { left: 40, right: 396, top: 8, low: 112, height: 146 }; // of the plot, in a picture 400 wide

// what: which of KINDS. null where the candidate has no such values. parent: may be undefined.
function blockPlot(what, node, parent) {
  const { name, unit, scale, bars } = KINDS[what];
  const scaled = (values) => values?.map((value) => (value === null ? null : value * scale));
  const own = scaled(node[what]);
  const theirs = scaled(parent?.[what]);
  const finite = [...(own ?? []), ...(theirs ?? [])].filter((value) => value !== null);
  if (!own || !finite.length) return null;

  const { ticks, floor, ceiling } = range(finite, bars);
  const wide = (BOX.right - BOX.left) / own.length;
  const x = (block) => BOX.left + (block + 0.5) * wide;
  const y = (value) => BOX.low - ((value - floor) / (ceiling - floor)) * (BOX.low - BOX.top);
  const label = `${name} of ${node.id}: ${unit}`;
  const picture = draw("svg", { viewBox: `0 0 400 ${BOX.height}`, role: "img", "aria-label": label });
  drawFrame(picture, ticks, own.length, x, y);
  const line = (kind, values) => draw("path", { class: kind, d: polyline(values, x, y) });
  if (bars) picture.append(...own.map((value, block) => bar(value ?? floor, x(block), y, wide)));
  if (theirs) picture.append(line("parent", theirs));
  if (!bars) picture.append(line("own", own));
  const said = (value) =>
    value === null || value === undefined ? "–" : bars ? value.toFixed(4) : `${value.toFixed(2)}%`;
  own.forEach((value, block) => {
    const words = `block ${block}: ${said(value)}${theirs ? `; ${parent.id}: ${said(theirs[block])}` : ""}`;
    const area = { class: "pointer", x: x(block) - wide / 2, y: BOX.top, width: wide, height: BOX.low - BOX.top };
    picture.append(draw("rect", area, draw("title", {}, words)));
  });
  const about = make("span", `${unit}${theirs ? `; thin line: ${parent.id}` : ""}`);
  return make("figure.plot", make("figcaption", `${name} `, about), picture);
}

// Bars begin at zero, lines where the values do.
function range(values, bars) {
  let floor = bars ? 0 : Math.min(...values);
  let ceiling = Math.max(...values);
  if (!(ceiling > floor)) ceiling = floor + 1;
  const rough = evenTicks(floor, ceiling, 3);
  const step = rough.length > 1 ? rough[1] - rough[0] : ceiling - floor;
  floor = Math.floor(floor / step + 1e-9) * step;
  ceiling = Math.ceil(ceiling / step - 1e-9) * step;
  const ticks = evenTicks(floor, ceiling, Math.round((ceiling - floor) / step));
  return { ticks, floor, ceiling };
}

function drawFrame(picture, ticks, blocks, x, y) {
  const { left, right, low } = BOX;
  for (const tick of ticks) {
    picture.append(draw("line", { class: "grid", x1: left, x2: right, y1: y(tick), y2: y(tick) }));
    picture.append(draw("text", { x: left - 7, y: y(tick) + 4, "text-anchor": "end" }, String(tick)));
  }
  for (const block of evenTicks(0, blocks - 1, 7).filter(Number.isInteger))
    picture.append(draw("text", { x: x(block), y: low + 16, "text-anchor": "middle" }, String(block)));
  const words = "block (0: nearest to the input)";
  picture.append(draw("text", { x: (left + right) / 2, y: low + 32, "text-anchor": "middle" }, words));
}

function bar(value, middle, y, wide) {
  const height = Math.max(0, BOX.low - y(value));
  return draw("rect", { class: "bars", x: middle - wide * 0.36, y: y(value), width: wide * 0.72, height });
}

function polyline(values, x, y) {
  const place = (value, block) => `${x(block).toFixed(1)} ${y(value).toFixed(1)}`;
  const joined = (block) => block > 0 && values[block - 1] !== null;
  return values.map((value, b) => (value === null ? "" : `${joined(b) ? "L" : "M"}${place(value, b)}`)).join("");
}
