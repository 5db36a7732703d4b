// What several parts of the page use: elements, marks, numbers as text, ticks, and a diff of lines.

const SVG = "http://www.w3.org/2000/svg";
const LONG_DIFF = 4e6; // cells of the table of a line diff; beyond, everything counts as changed
const CORNERS = { mutate: [3, -90], simplify: [3, 90], tune: [4, 0], seed: [4, 45], repair: [5, -90] }; // number, degrees

// An element, as "tag.class.class". Of what follows, plain objects are its properties, nodes and text its children; what
// is null, undefined or false is left out.
function make(what, ...rest) {
  const [tag, ...classes] = what.split(".");
  const element = document.createElement(tag);
  element.className = classes.join(" ");
  for (const part of rest.flat(Infinity))
    if (part?.constructor === Object) Object.assign(element, part);
    else if (part || part === 0) element.append(part);
  return element;
}

// The same in a picture, with attributes.
function draw(tag, attributes, ...children) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

// The mark of an operator as a small picture.
function mark(operator, colour) {
  const points = [];
  let round = "";
  const pen = {
    moveTo: (x, y) => points.push(`M${x.toFixed(2)} ${y.toFixed(2)}`),
    lineTo: (x, y) => points.push(`L${x.toFixed(2)} ${y.toFixed(2)}`),
    closePath: () => points.push("Z"),
    arc: (x, y, r) => (round = `M${x - r} ${y}a${r} ${r} 0 1 0 ${2 * r} 0a${r} ${r} 0 1 0 ${-2 * r} 0Z`),
  };
  trace(pen, operator, 0, 0, 5.4);
  const picture = draw("svg", { viewBox: "-8 -8 16 16", "aria-hidden": "true" });
  picture.append(draw("path", { d: round || points.join(""), fill: colour }));
  return picture;
}

function perplexity(nats) {
  return nats < 700 ? Math.exp(nats) : Infinity;
}

function plainNumber(value) {
  if (!Number.isFinite(value)) return "∞";
  if (value >= 1e6) {
    const power = Math.floor(Math.log10(value));
    const digits = [...String(power)].map((digit) => "⁰¹²³⁴⁵⁶⁷⁸⁹"[digit]).join("");
    return `${+(value / 10 ** power).toPrecision(2)}×10${digits}`;
  }
  return value.toLocaleString(
    "en-US",
    value >= 100 ? { maximumFractionDigits: value >= 1000 ? 0 : 1 } : { maximumSignificantDigits: 4 },
  );
}

function perplexityText(nats) {
  const value = perplexity(nats);
  return value < 1000 ? value.toFixed(value < 10 ? 3 : 2) : plainNumber(value);
}

function signed(value, digits) {
  return (value < 0 ? "−" : "+") + Math.abs(value).toFixed(digits);
}

// Adds the operator's mark to the context's path; all marks look equally large.
function trace(context, operator, x, y, r) {
  if (operator === "crossover") {
    const a = r * 1.1;
    const b = r * 0.42;
    const xs = [-b, b, b, a, a, b, b, -b, -b, -a, -a, -b];
    const ys = [-a, -a, -b, -b, b, b, a, a, b, b, -b, -b];
    xs.forEach((dx, i) => (i ? context.lineTo(x + dx, y + ys[i]) : context.moveTo(x + dx, y + ys[i])));
    context.closePath();
    return;
  }
  const shape = CORNERS[operator];
  if (!shape) {
    context.moveTo(x + r, y);
    context.arc(x, y, r, 0, 2 * Math.PI);
    return;
  }
  const [count, start] = shape;
  const size = r * { 3: 1.34, 4: 1.22, 5: 1.14 }[count];
  const middle = count === 3 ? y - Math.sign(start) * r * 0.16 : y; // a triangle's centre of gravity
  for (let i = 0; i < count; i++) {
    const angle = ((start + (360 / count) * i) * Math.PI) / 180;
    const place = [x + size * Math.cos(angle), middle + size * Math.sin(angle)];
    i ? context.lineTo(...place) : context.moveTo(...place);
  }
  context.closePath();
}

// Ticks between two numbers of nats, as perplexities: powers of ten and what lies well between, or even steps.
function perplexityTicks(low, high, most) {
  const from = Math.exp(low);
  const to = Math.exp(high);
  if (!(from > 0 && Number.isFinite(to))) return []; // beyond what a number can be
  if (to / from < 2.5) return evenTicks(from, to, most);
  for (const mantissas of [[1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8], [1, 1.5, 2, 3, 5, 7], [1, 2, 5], [1, 3], [1]]) {
    const ticks = [];
    for (let power = Math.floor(Math.log10(from)); power <= Math.log10(to); power++)
      for (const mantissa of mantissas) ticks.push(mantissa * 10 ** power);
    const inside = ticks.filter((tick) => tick >= from && tick <= to);
    if (inside.length <= most) return inside;
    if (mantissas.length === 1) return inside.filter((_, i) => i % Math.ceil(inside.length / most) === 0);
  }
}

function evenTicks(from, to, most) {
  const rough = (to - from) / Math.max(1, most);
  if (!(rough > 0)) return [from];
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= rough);
  const ticks = [];
  for (let i = Math.ceil(from / step); i * step <= to + step * 1e-9; i++) ticks.push(+(i * step).toPrecision(12));
  return ticks;
}

// Lines of `after` and `before` in order, as [sign, line]: "+" only in after, "−" only in before, " " in both.
function lineDiff(before, after) {
  const a = before.split("\n");
  const b = after.split("\n");
  const wide = b.length + 1;
  if (a.length * b.length > LONG_DIFF) return [...a.map((line) => ["−", line]), ...b.map((line) => ["+", line])];
  const common = new Uint16Array((a.length + 1) * wide); // longest common subsequence of what follows (i, j)
  for (let i = a.length - 1; i >= 0; i--)
    for (let j = b.length - 1; j >= 0; j--)
      common[i * wide + j] =
        a[i] === b[j]
          ? 1 + common[(i + 1) * wide + j + 1]
          : Math.max(common[(i + 1) * wide + j], common[i * wide + j + 1]);
  const lines = [];
  let i = 0;
  let j = 0;
  while (i < a.length || j < b.length) {
    if (i < a.length && j < b.length && a[i] === b[j]) {
      lines.push([" ", a[i++]]);
      j++;
    } else if (j === b.length || (i < a.length && common[(i + 1) * wide + j] >= common[i * wide + j + 1]))
      lines.push(["−", a[i++]]);
    else lines.push(["+", b[j++]]);
  }
  return lines;
}
