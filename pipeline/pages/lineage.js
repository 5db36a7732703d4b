// The page: reads the data, holds what is selected, searched for and filtered, and hands it to the graph and the panel.

const LEGENDS = {
  operator: {
    at: "operators",
    name: "Operator (shape)",
    order: ["seed", "explore", "mutate", "crossover", "simplify", "tune", "repair"],
  },
  status: {
    at: "statuses",
    name: "Status",
    order: ["evaluated", "proposed", "repeat", "screened", "surplus", "invalid", "failed", "poison"],
  },
  verdict: { at: "verdicts", name: "Verdict", order: ["confirmed", "inconclusive", "refuted", "not compared"] },
};
const MEANINGS = {
  seed: "a known algorithm that the search began with",
  explore: "something of another kind",
  mutate: "a change of one parent",
  crossover: "two parents joined",
  simplify: "less code for the same",
  tune: "other constants, by a cheap search",
  repair: "asked for once more, with the error",
  evaluated: "has a fitness",
  proposed: "written, not yet measured",
  repeat: "prunes the same weights as an earlier one",
  screened: "stopped by a cheap measurement",
  surplus: "new, but its generation had enough",
  invalid: "refused by the language or on the probe",
  failed: "its evaluation gave no number",
  poison: "brought evaluators down",
  confirmed: "better than its first parent by more than the standard error",
  refuted: "worse by more than the standard error",
  inconclusive: "within the standard error",
  "not compared": "it or its first parent has no fitness, or it has no parent",
};
const WIDE = "(min-width: 1081px)"; // as in the style

const find = (id) => document.getElementById(id);

function readLineage() {
  const data = JSON.parse(find("data").textContent);
  const text = (place) => (place === undefined ? "" : data.texts[place]);
  const nodes = data.candidates.map((candidate) => {
    const node = { parents: [], against: [], rungs: {}, ...candidate, children: [] };
    for (const name of ["diagnosis", "hypothesis", "error", "answer"]) node[name] = text(candidate[name]);
    const head = [
      `# group: ${node.group}`,
      `# allocation: ${node.allocate === undefined ? node.allocation : "the function below"}`,
      node.update && `# update: ${node.update}`,
    ];
    const functions = [text(node.allocate), text(node.score)].map((source) => source.trim()).filter(Boolean);
    node.code = candidate.score === undefined ? "" : `${head.filter(Boolean).join("\n")}\n${functions.join("\n\n\n")}`;
    node.nats = node.nll < 700 ? node.nll : Infinity; // beyond, perplexity is no number
    const verdict = node.against[0]?.effect === undefined ? null : node.against[0].verdict;
    node.verdict = verdict in VERDICTS ? verdict : "not compared";
    return node;
  });
  for (const node of nodes) for (const place of node.parents) nodes[place].children.push(node);
  const pathTo = (node) => {
    const path = [node];
    while (path[0].parents.length) path.unshift(nodes[path[0].parents[0]]);
    return path;
  };
  const best = nodes[data.best];
  const dense = data.dense ?? null;
  const times = dense === 0; // fitness is nats above the dense model
  const known = LEGENDS.status.order.filter((status) => nodes.some((node) => node.status === status));
  const statuses = new Set([...known, ...nodes.map((node) => node.status)]);
  const last = Math.max(...nodes.map((node) => node.generation));
  const measure = `perplexity on the fitness split${times ? ", as a multiple of the dense model’s" : ""}`;
  return { nodes, best, dense, times, pathTo, path: pathTo(best), statuses, last, measure };
}

const lineage = readLineage();
const off = { operator: new Set(), status: new Set(), verdict: new Set() };
const shown = {
  selected: null,
  ancestors: new Set(),
  query: "",
  matches: null,
  hidden: (node) => off.operator.has(node.operator) || off.status.has(node.status) || off.verdict.has(node.verdict),
};
const graph = new Graph(find("canvas"), lineage, shown, (node) => select(node));
const colour = (node) => (node.status === "evaluated" ? graph.shade(node) : "var(--quiet)");
const panel = new Panel(find("panel"), lineage, shown, (node) => select(node, true), colour);

// ---- Selection

// follow: a link was, so the focus goes where the eye is.
function select(node, follow = false) {
  shown.selected = node;
  shown.ancestors = new Set();
  for (const open = [node].filter(Boolean); open.length;)
    for (const place of open.pop().parents) {
      const parent = lineage.nodes[place];
      if (!shown.ancestors.has(parent)) open.push(parent);
      shown.ancestors.add(parent);
    }
  panel.show();
  if (node) graph.reveal(node);
  if (follow) find("panel").querySelector("h2").focus({ preventScroll: true });
  find("live").textContent = node ? announced(node) : "Nothing selected";
  graph.request();
}

function announced(node) {
  const result = node.status === "evaluated" ? `perplexity ${perplexityText(node.nats)}` : node.status;
  const verdict =
    node.verdict === "not compared" ? "" : `, ${node.verdict} against ${lineage.nodes[node.parents[0]].id}`;
  return `${node.id}, ${node.operator}, generation ${node.generation}, ${result}${verdict}`;
}

// ---- Search

let haystacks = null;

function search(words) {
  shown.query = words.trim().toLowerCase();
  haystacks ??= lineage.nodes.map((node) =>
    [node.id, node.diagnosis, node.hypothesis, node.code, node.answer, node.error].join("\n").toLowerCase(),
  );
  shown.matches = shown.query ? new Set(lineage.nodes.filter((_, i) => haystacks[i].includes(shown.query))) : null;
  tellFound();
  panel.refresh();
  graph.request();
}

function reachable() {
  return [...(shown.matches ?? [])].filter((node) => !shown.hidden(node));
}

function tellFound() {
  const matches = reachable();
  const count = matches.length.toLocaleString("en-US");
  const at = matches.indexOf(shown.selected) + 1;
  const words = at ? `${at} of ${count}` : matches.length === 1 ? "1 match" : `${count} matches`;
  find("found").textContent = shown.matches ? words : "";
}

function nextMatch(step) {
  const matches = reachable();
  if (!matches.length) return;
  const at = matches.indexOf(shown.selected);
  select(matches[at < 0 ? (step > 0 ? 0 : matches.length - 1) : (at + step + matches.length) % matches.length]);
  tellFound();
}

// ---- Legend and filters

function buildLegend(kind) {
  const { at, name, order } = LEGENDS[kind];
  const counts = new Map();
  for (const node of lineage.nodes) counts.set(node[kind], (counts.get(node[kind]) ?? 0) + 1);
  const values = [
    ...order.filter((value) => counts.has(value)),
    ...[...counts.keys()].filter((value) => !order.includes(value)),
  ];
  const boxes = values.map((value) => make("input", { type: "checkbox", checked: true, value }));
  const apply = () => {
    off[kind] = new Set(boxes.filter((box) => !box.checked).map((box) => box.value));
    graph.request();
    tellFound();
  };
  const all = (checked) => () => {
    for (const box of boxes) box.checked = checked;
    apply();
  };
  const whole = (words, checked) =>
    make("button", { type: "button", onclick: all(checked), ariaLabel: `${words} of ${name}` }, words);
  const choices = values.map((value, i) =>
    make(
      "label.choice",
      { title: MEANINGS[value] ?? "" },
      boxes[i],
      kind === "operator" && mark(value, "var(--soft)"),
      make("span", value),
      make("span.number", counts.get(value).toLocaleString("en-US")),
    ),
  );
  for (const box of boxes) box.addEventListener("change", apply);
  find(at).append(
    make(
      "div.legend",
      make("span", { id: `${at}-name` }, name),
      make("span.whole", whole("all", true), whole("none", false)),
    ),
    ...choices,
  );
}

function buildScale() {
  find("scale-name").textContent = `${lineage.times ? "Perplexity, × dense" : "Perplexity"} (colour)`;
  find("ramp").style.background = `linear-gradient(to right, ${graph.shades.join(", ")})`;
  const at = (share) => make("span", plainNumber(Math.exp(graph.low + share * (graph.cut - graph.low))));
  const edge = make("span", graph.above.length ? "≥ " : "", plainNumber(Math.exp(graph.cut)));
  find("ramp-numbers").replaceChildren(at(0), at(0.5), edge);
  const count = graph.above.length;
  const worst = Math.max(...graph.above.map((node) => node.nats));
  const many = `${count.toLocaleString("en-US")} ${count === 1 ? "candidate is" : "candidates are"} worse`;
  const note = `${many}, up to ${plainNumber(perplexity(worst))}: in the band above the plot.`;
  find("scale-note").textContent = count ? note : "";
}

function summary() {
  const measured = lineage.nodes.filter((node) => node.status === "evaluated").length;
  const { best, dense, times } = lineage;
  const all = lineage.nodes.length.toLocaleString("en-US");
  const generations = `${lineage.last} ${lineage.last === 1 ? "generation" : "generations"}`;
  const parts = [`${all} candidates in ${generations}, ${measured.toLocaleString("en-US")} measured`];
  if (best.status === "evaluated")
    parts.push(`best ${best.id}: perplexity ${perplexityText(best.nats)}${times ? " × dense" : ""}`);
  if (dense !== null && !times) parts.push(`dense ${perplexityText(dense)}`);
  return parts.join(" · ");
}

// ---- Keyboard, buttons, theme

// From the top of the screen to its bottom.
function neighbour(node, step) {
  const column = graph.columns.get(node.generation).filter((other) => !shown.hidden(other) || other === node);
  const height = new Map(column.map((other) => [other, graph.at(other)[1]]));
  column.sort((a, b) => height.get(a) - height.get(b) || a.x - b.x);
  return column[column.indexOf(node) + step];
}

// Along the path to the best candidate where the node is on it.
function bestChild(node) {
  const onPath = lineage.path[lineage.path.indexOf(node) + 1];
  if (lineage.path.includes(node) && onPath && !shown.hidden(onPath)) return onPath;
  const children = node.children.filter((child) => !shown.hidden(child));
  return children.sort((a, b) => a.nats - b.nats)[0];
}

const KEYS = {
  ArrowLeft: (node) => node.parents.map((place) => lineage.nodes[place]).find((parent) => !shown.hidden(parent)),
  ArrowRight: bestChild,
  ArrowUp: (node) => neighbour(node, -1),
  ArrowDown: (node) => neighbour(node, 1),
};

function goToBest() {
  select(lineage.best);
}

function clear() {
  if (shown.matches) {
    find("search").value = "";
    search("");
  } else select(null);
}

const COMMANDS = {
  "/": () => find("search").focus(),
  "?": () => find("help").showModal(),
  b: goToBest,
  c: () => shown.selected && panel.toggleChain(),
  0: () => graph.fit(),
  "+": () => graph.zoomMiddle(1.4),
  "=": () => graph.zoomMiddle(1.4),
  "-": () => graph.zoomMiddle(1 / 1.4),
  Escape: clear,
};

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || find("help").open) return;
  const inSearch = event.target === find("search");
  const scrolls = find("panel").contains(event.target);
  if (inSearch && event.key === "Enter") nextMatch(event.shiftKey ? -1 : 1);
  else if (inSearch && event.key === "Escape") {
    if (shown.matches) clear();
    else find("canvas").focus();
  } else if (inSearch) return;
  else if (event.key in KEYS) {
    // In the panel, up and down are for reading.
    if (scrolls && (event.key === "ArrowUp" || event.key === "ArrowDown" || event.target.closest(".code"))) return;
    const next = shown.selected ? KEYS[event.key](shown.selected) : lineage.best;
    if (next) select(next);
  } else if (event.key in COMMANDS) COMMANDS[event.key]();
  else return;
  event.preventDefault();
});

const darkByDefault = matchMedia("(prefers-color-scheme: dark)");

function recolour() {
  graph.recolour();
  find("theme").textContent = graph.dark ? "Light" : "Dark";
  find("theme").setAttribute("aria-label", `${graph.dark ? "Light" : "Dark"} theme`);
  buildScale();
  panel.refresh();
}

darkByDefault.addEventListener("change", recolour);
find("theme").addEventListener("click", () => {
  document.documentElement.dataset.theme = graph.dark ? "light" : "dark";
  recolour();
});
find("search").addEventListener("input", (event) => search(event.target.value));
find("go-best").addEventListener("click", goToBest);
find("go-fit").addEventListener("click", () => graph.fit());
find("help-open").addEventListener("click", () => find("help").showModal());

for (const kind of Object.keys(LEGENDS)) buildLegend(kind);
find("summary").textContent = summary();
find("rail").open = matchMedia(WIDE).matches;
matchMedia(WIDE).addEventListener("change", (event) => (find("rail").open = event.matches));
recolour();
select(lineage.best);

// For tests and the console: where a candidate is on the screen (CSS pixels), and what the page did.
const named = (id) => lineage.nodes.find((node) => node.id === id);
window.lineage = Object.freeze({
  position: (id) => {
    const { left, top } = find("canvas").getBoundingClientRect();
    const [x, y] = graph.at(named(id));
    return [left + x, top + y];
  },
  select: (id) => select(named(id)),
  selected: () => shown.selected?.id ?? null,
  matches: () => reachable().map((node) => node.id),
  frames: () => ({ ...graph.frames }),
});
