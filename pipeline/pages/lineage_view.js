// What of the graph is seen: where candidates lie, pan and zoom, and which of them is at a place on the screen.
//
// What was measured lies at (generation, nats): nats are the logarithm of perplexity. What is worse than `cut` lies in
// a band above the plot, what has no fitness in a strip below it, one lane for each status. The three share x; only the
// plot zooms in y.

const SPREAD = 0.76; // of a generation's column that its candidates take
const OUTLIER = Math.log(1.4); // nats above the third quartile (or the best) at which the plot ends
const LANE = 16; // pixels
const BAND = 26;
const GAP = 10;
const LEAST = { x: 0.4, y: 1e-4 }; // generations and nats that can be seen at least

class View {
  // lineage, shown: see lineage.js; what is shown is read at every frame.
  constructor(lineage, shown) {
    Object.assign(this, { lineage, shown });
    this.place();
  }

  request() {} // to be drawn anew

  place() {
    const columns = new Map();
    for (const node of this.lineage.nodes) {
      if (!columns.has(node.generation)) columns.set(node.generation, []);
      columns.get(node.generation).push(node);
    }
    for (const [generation, column] of columns)
      column.forEach((node, i) => (node.x = generation + SPREAD * ((i + 0.5) / column.length - 0.5)));

    const measured = this.lineage.nodes.filter((node) => node.status === "evaluated");
    const finite = (node) => Number.isFinite(node.nats);
    const nats = measured.filter(finite).map((node) => node.nats);
    nats.sort((a, b) => a - b);
    this.low = nats[0] ?? 0;
    const quartile = nats[Math.floor(0.75 * nats.length)] ?? 1;
    const inside = finite(this.lineage.best) ? Math.max(quartile, this.lineage.best.nats) : quartile;
    this.cut = Math.max(Math.min(inside + OUTLIER, nats.at(-1) ?? 1), this.low + 1e-3);
    this.density = measured.length;
    for (const node of measured) node.above = !(node.nats <= this.cut);
    this.above = measured.filter((node) => node.above);
    this.lanes = [...this.lineage.statuses].filter((status) => status !== "evaluated");
    this.columns = columns;
    const span = this.cut - this.low; // room for the label below the best
    this.whole = { x0: -0.62, x1: this.lineage.last + 0.62, y0: this.low - 0.12 * span, y1: this.cut + 0.02 * span };
    this.view = { ...this.whole };
  }

  // 0 for the best, 1 for the upper edge and all that is worse.
  badness(node) {
    return Math.min(1, Math.max(0, (node.nats - this.low) / (this.cut - this.low)));
  }

  // ---- Geometry, in CSS pixels of the canvas

  // width, height: of the canvas.
  layOut(width, height) {
    const strip = this.lanes.length * LANE;
    const bottom = height - 44;
    this.box = { left: 84, right: width - 18, top: 40 + (this.above.length ? BAND : 0), strip: bottom - strip, bottom };
    this.box.low = this.box.strip - (strip ? GAP : 0); // where the plot ends
    this.request();
  }

  screenX(x) {
    const { left, right } = this.box;
    const { x0, x1 } = this.view;
    return left + ((x - x0) / (x1 - x0)) * (right - left);
  }

  screenY(nats) {
    const { top, low } = this.box;
    const { y0, y1 } = this.view;
    return low - ((nats - y0) / (y1 - y0)) * (low - top);
  }

  at(node) {
    const lane = this.lanes.indexOf(node.status);
    if (lane >= 0) return [this.screenX(node.x), this.box.strip + (lane + 0.5) * LANE];
    if (node.above) return [this.screenX(node.x), this.box.top - BAND / 2 - 3];
    return [this.screenX(node.x), this.screenY(node.nats)];
  }

  inside(node, [x, y] = this.at(node)) {
    const { left, right, top, low } = this.box;
    if (x < left - 4 || x > right + 4) return false;
    return node.status !== "evaluated" || node.above || (y >= top - 4 && y <= low + 4);
  }

  get radius() {
    const zoom = (this.whole.x1 - this.whole.x0) / (this.view.x1 - this.view.x0);
    const room = Math.sqrt((this.box.right - this.box.left) / 900);
    return Math.min(7, Math.max(3.6, (50 * room) / Math.sqrt(Math.max(1, this.density) / zoom)));
  }

  hit(x, y) {
    let nearest = null;
    let least = Math.max(10, this.radius + 4) ** 2;
    for (const node of this.lineage.nodes) {
      if (this.shown.hidden(node)) continue;
      const place = this.at(node);
      const distance = (place[0] - x) ** 2 + (place[1] - y) ** 2;
      if (distance <= least && this.inside(node, place)) [nearest, least] = [node, distance];
    }
    return nearest;
  }

  // ---- Moving

  fit() {
    this.view = { ...this.whole };
    this.request();
  }

  // The view with its middle within the lineage, so that this cannot be lost from sight, and not too far in or out.
  bounded(view) {
    const [x0, x1] = this.span(view, "x0", "x1", LEAST.x);
    const [y0, y1] = this.span(view, "y0", "y1", LEAST.y);
    return { x0, x1, y0, y1 };
  }

  span(view, from, to, least) {
    const most = 1.25 * (this.whole[to] - this.whole[from]);
    const half = Math.min(most, Math.max(least, view[to] - view[from])) / 2;
    const middle = Math.min(this.whole[to], Math.max(this.whole[from], (view[from] + view[to]) / 2));
    return [middle - half, middle + half];
  }

  pan(dx, dy) {
    const { left, right, top, low } = this.box;
    const v = this.view;
    const x = (dx / (right - left)) * (v.x1 - v.x0);
    const y = (dy / (low - top)) * (v.y1 - v.y0);
    this.view = this.bounded({ x0: v.x0 - x, x1: v.x1 - x, y0: v.y0 + y, y1: v.y1 + y });
    this.request();
  }

  // What lies at (x, y) stays there. Outside the plot, only the axis that is there zooms.
  zoom(factor, x, y, onlyX = false) {
    const { left, right, top, low } = this.box;
    const view = { ...this.view };
    const about = (share, from, to, least) => {
      const middle = view[from] + share * (view[to] - view[from]);
      const most = 1.25 * (this.whole[to] - this.whole[from]);
      const span = Math.min(most, Math.max(least, (view[to] - view[from]) / factor));
      Object.assign(view, { [from]: middle - share * span, [to]: middle + (1 - share) * span });
    };
    if (x >= left) about((x - left) / (right - left), "x0", "x1", LEAST.x);
    if (y <= low && !onlyX) about((low - y) / (low - top), "y0", "y1", LEAST.y);
    this.view = this.bounded(view);
    this.request();
  }

  zoomMiddle(factor) {
    const { left, right, top, low } = this.box;
    this.zoom(factor, (left + right) / 2, (top + low) / 2);
  }

  reveal(node) {
    const [x, y] = this.at(node);
    const { left, right, top, low } = this.box;
    const off = (place, from, to) => (place < from - 4 || place > to + 4 ? (from + to) / 2 - place : 0);
    const dy = node.status === "evaluated" && !node.above ? off(y, top, low) : 0;
    if (off(x, left, right) || dy) this.pan(off(x, left, right), dy);
    this.request();
  }
}
