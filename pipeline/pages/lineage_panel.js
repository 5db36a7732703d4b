// The panel beside the graph: one candidate in full, or the chain of reasoning that led to it.
//
// What a language model wrote becomes text nodes and nothing else.

const VERDICTS = { confirmed: "✓ confirmed", refuted: "✗ refuted", inconclusive: "≈ inconclusive" };
const RUNGS = { probe: "on 128 tokens", cheap: "on a few windows" };
const MOST_LINKS = 12;

function effectText(edge) {
  const effect = edge.effect ?? null;
  if (effect === null) return null;
  return signed(effect, 4) + (edge.effect_error === undefined ? "" : ` ± ${edge.effect_error.toFixed(4)}`) + " nats";
}

// One of several buttons of which one is pressed.
function choice(words, pressed, action) {
  return make("button.button", { type: "button", ariaPressed: String(pressed), onclick: action }, words);
}

class Panel {
  // element: where it is. lineage, shown: as in lineage.js. pick(node): where a link is followed. colour(node): its
  // mark's.
  constructor(element, lineage, shown, pick, colour) {
    Object.assign(this, { element, lineage, shown, pick, colour, chain: false, plain: false });
  }

  // The first one, or undefined.
  parent(node) {
    return this.lineage.nodes[node.parents[0]];
  }

  show() {
    const node = this.shown.selected;
    this.element.replaceChildren(
      ...(node ? [this.head(node), ...(this.chain ? [this.steps(node)] : this.details(node))] : [this.nothing()]),
    );
    this.element.scrollTop = 0;
  }

  // The same candidate again, where the reader is.
  refresh() {
    const top = this.element.scrollTop;
    this.show();
    this.element.scrollTop = top;
  }

  nothing() {
    return make(
      "p.soft",
      "Select a candidate: click on a mark, press an arrow key, or ",
      make("button.link", { type: "button", onclick: () => this.pick(this.lineage.best) }, "go to the best one"),
      ".",
    );
  }

  toggleChain(chain = !this.chain) {
    this.chain = chain;
    this.show();
    this.element.querySelector(".views [aria-pressed=true]")?.focus();
  }

  // The words with what is searched for marked in them.
  marked(text) {
    const query = this.shown.query;
    if (!query) return [text];
    const lower = text.toLowerCase();
    const parts = [];
    let from = 0;
    // Some characters change their length in lower case: then nothing is marked, rather than the wrong thing.
    for (let at = lower.length === text.length ? lower.indexOf(query) : -1; at >= 0; at = lower.indexOf(query, from)) {
      parts.push(text.slice(from, at), make("mark", text.slice(at, at + query.length)));
      from = at + query.length;
    }
    return [...parts, text.slice(from)];
  }

  link(node) {
    return make("button.link", { type: "button", onclick: () => this.pick(node) }, ...this.marked(node.id));
  }

  // The best first, and of many only these at once.
  links(nodes) {
    const links = [...nodes].sort((a, b) => a.nats - b.nats).map((node) => this.link(node));
    const rest = links.splice(MOST_LINKS);
    const more = rest.length && make("details", make("summary", `${rest.length} more`), make("span.links", rest));
    return [make("span.links", links), more || null];
  }

  verdict(words) {
    return make("span", { className: `verdict ${words in VERDICTS ? words : ""}` }, VERDICTS[words] ?? words);
  }

  head(node) {
    const view = (words, chain) => choice(words, this.chain === chain, () => this.toggleChain(chain));
    return make(
      "div",
      make(
        "h2",
        { tabIndex: -1 },
        mark(node.operator, this.colour(node)),
        make("span", ...this.marked(node.id)),
        node === this.lineage.best && make("span.best", "best"),
      ),
      make("p.soft", `${node.operator} · generation ${node.generation} · ${node.status}`),
      make(
        "div.views",
        { role: "group", ariaLabel: "What is shown" },
        view("Details", false),
        view("Chain of reasoning", true),
      ),
    );
  }

  details(node) {
    return [
      this.refusal(node),
      this.figures(node),
      this.thought(node),
      this.evidence(node),
      this.code(node),
      blockPlot("sparsities", node, this.parent(node)),
      blockPlot("errors", node, this.parent(node)),
    ].filter(Boolean);
  }

  refusal(node) {
    const repeated = node.repeats === undefined ? null : this.lineage.nodes[node.repeats];
    if (repeated)
      return make(
        "p.figures.refused",
        make("span", "It prunes the same weights as ", this.link(repeated), ", so it was not measured."),
      );
    if (node.error) return make("p.figures.refused.words", ...this.marked(node.error));
    return null;
  }

  figures(node) {
    const rows = [];
    const { dense, times } = this.lineage;
    const small = (...words) => make("small", ...words);
    const row = (name, ...values) => rows.push(make("dt", name), make("dd", ...values));
    const within = (nats, error, windows) => {
      const tail = error === undefined ? "" : ` ± ${error.toFixed(4)}`;
      return [
        `${Number.isFinite(nats) ? nats.toFixed(4) : "∞"}${tail}`,
        " ",
        small(`nats per token${windows > 1 ? `, ${windows} windows` : ""}`),
      ];
    };
    if (node.status === "evaluated") {
      row(
        times ? "Perplexity, × dense" : "Perplexity",
        perplexityText(node.nats),
        " ",
        small(dense === null || times ? "" : `dense ${perplexityText(dense)}`),
      );
      row("Fitness", ...within(node.nll ?? Infinity, node.nll_error, node.windows));
      if (dense !== null && !times && Number.isFinite(node.nats))
        row("Above dense", signed(node.nats - dense, 4), " ", small("nats per token"));
    }
    if ("fresh_windows" in node) {
      const fresh = node.fresh ?? Infinity;
      row(
        "Fresh text",
        perplexityText(fresh),
        " ",
        small(`perplexity${times ? ", × dense," : ""} on text that no generation saw`),
        make("br"),
        ...within(fresh, node.fresh_error, node.fresh_windows),
      );
    }
    if (node.sparsity !== undefined)
      row("Sparsity", `${(100 * node.sparsity).toFixed(2)}%`, " ", small("of prunable weights removed"));
    for (const [name, value] of Object.entries(node.rungs))
      row(
        `First look: ${name}`,
        value === null ? "∞" : value.toFixed(4),
        " ",
        small(`nats per token${RUNGS[name] ? `, ${RUNGS[name]}` : ""}`),
      );
    if (node.rival !== undefined) row("Held against", this.link(this.lineage.nodes[node.rival]));
    if (node.trials) row("Constants", `the best of ${node.trials} trials`);
    if (node.salvaged) row("Mended", node.salvaged.join(", "));
    row(
      "Parents",
      node.parents.length
        ? make(
            "span.links",
            node.parents.map((place) => this.link(this.lineage.nodes[place])),
          )
        : make("span.soft", "none"),
    );
    row("Children", node.children.length ? this.links(node.children) : make("span.soft", "none"));
    return make("dl.figures", rows);
  }

  thought(node) {
    if (!node.diagnosis && !node.hypothesis) return null;
    const part = (name, words) => words && make("p.words", make("b", `${name} `), ...this.marked(words));
    return make(
      "section",
      make("h3", "Thought"),
      part("Diagnosis", node.diagnosis),
      part("Hypothesis", node.hypothesis),
    );
  }

  evidence(node) {
    const edges = node.against
      .map((edge, i) => [edge, this.lineage.nodes[node.parents[i]]])
      .filter(([edge]) => edge.effect !== undefined || edge.mask !== undefined);
    if (!edges.length) return null;
    return make(
      "section",
      make("h3", "Against its parents"),
      edges.map(([edge, parent]) =>
        make(
          "div.against",
          make(
            "div",
            edge.effect !== undefined && this.verdict(edge.verdict),
            make("span.number", effectText(edge) ?? ""),
            make("span", make("span.soft", "against "), this.link(parent)),
          ),
          edge.mask !== undefined && make("p", `${(100 * edge.mask).toFixed(1)}% of the probe's mask changed`),
          edge.better !== undefined && make("p", this.movement(node, parent, edge)),
        ),
      ),
    );
  }

  // Where in the model the error of the hidden states moved.
  movement(node, parent, edge) {
    const change = (block) => (node.errors?.[block] ?? NaN) - (parent.errors?.[block] ?? NaN);
    const said = (block) => `block ${block}${Number.isFinite(change(block)) ? ` (${signed(change(block), 4)})` : ""}`;
    const fell = change(edge.better) > 0 ? "rose least" : "fell most";
    const rose = change(edge.worse) < 0 ? "fell least" : "rose most";
    return `Error of the hidden states ${fell} at ${said(edge.better)}, ${rose} at ${said(edge.worse)}`;
  }

  code(node) {
    const own = node.code;
    const parent = this.parent(node);
    if (!own)
      return node.answer
        ? make("section", make("h3", "Answer"), this.listing([[" ", node.answer]], "What the language model wrote"))
        : null;
    const compared = parent?.code && !this.plain;
    const same = parent?.code === own;
    const lines = compared ? lineDiff(parent.code, own) : own.split("\n").map((line) => [" ", line]);
    const view = (words, plain) => choice(words, this.plain === plain, () => this.toggleDiff(plain));
    return make(
      "section",
      { id: "code" },
      make(
        "div.bar",
        make("h3", "Algorithm"),
        parent?.code &&
          make(
            "div.views",
            { role: "group", ariaLabel: "How the algorithm is shown" },
            view("Diff", false),
            view("Plain", true),
          ),
      ),
      compared &&
        make(
          "p.note",
          same ? "The same as " : "Lines marked + are new, lines marked − are gone, against ",
          this.link(parent),
        ),
      node.regrouped && make("p.note", `Compared by ${node.group}, unlike its answer: better on the probe's text.`),
      this.listing(lines, "Algorithm", compared),
    );
  }

  toggleDiff(plain) {
    this.plain = plain;
    this.refresh();
    this.element.querySelector("#code [aria-pressed=true]").focus({ preventScroll: true });
  }

  listing(lines, label, signs = false) {
    const kinds = { "+": "added", "−": "removed" };
    return make(
      "pre.code",
      { tabIndex: 0, ariaLabel: label },
      make(
        "code",
        lines.map(([sign, line]) =>
          make("span", { className: kinds[sign] ?? "" }, signs ? `${sign} ` : "", ...this.marked(line)),
        ),
      ),
    );
  }

  steps(node) {
    const path = this.lineage.pathTo(node);
    return make(
      "ol.chain",
      path.map((step, i) => {
        const before = path[i - 1];
        const edge = step.against[0];
        const compared = before && edge.effect !== undefined;
        const evidence =
          step.status !== "evaluated"
            ? `not measured: ${step.status}`
            : `perplexity${this.lineage.times ? ", × dense," : ""} ${perplexityText(step.nats)}`;
        return make(
          "li",
          { className: `step${step === node ? " here" : ""}` },
          make("div", this.link(step), make("span.soft", ` ${step.operator}, generation ${step.generation}`)),
          step.hypothesis && make("p.words", make("b", "Claim "), ...this.marked(step.hypothesis)),
          make(
            "p",
            make("b", "Evidence "),
            make("span.number", evidence),
            compared && [", ", make("span.number", effectText(edge)), ` against ${before.id}`],
            step.error && [": ", ...this.marked(step.error)],
          ),
          compared && make("p", make("b", "Verdict "), this.verdict(edge.verdict)),
        );
      }),
    );
  }
}
