// The graph on its canvas: how it is drawn, and what the pointer does to it. Where things are, View says.

const VIRIDIS = [
  "#440154",
  "#482475",
  "#414487",
  "#355f8d",
  "#2a788e",
  "#21918c",
  "#22a884",
  "#44bf70",
  "#7ad151",
  "#bddf26",
];
const SHADES = 64; // colours that are told apart on the canvas
class Graph extends View {
  // pick(node), when one is clicked.
  constructor(canvas, lineage, shown, pick) {
    super(lineage, shown);
    Object.assign(this, { canvas, pick, context: canvas.getContext("2d"), over: null });
    this.frames = { count: 0, milliseconds: 0 };
    this.listen();
    this.recolour();
  }

  // What is good stands out from the page in either theme: the scale is turned round in the dark one.
  recolour() {
    const probe = document.createElement("span");
    document.body.append(probe);
    const read = (name) => {
      probe.style.color = `var(--${name})`;
      return getComputedStyle(probe).color;
    };
    this.colours = Object.fromEntries(
      ["page", "sheet", "line", "ink", "soft", "quiet", "accent", "bad"].map((n) => [n, read(n)]),
    );
    this.font = getComputedStyle(document.body).fontFamily;
    probe.style.colorScheme = "inherit";
    probe.style.color = "light-dark(#000, #fff)";
    this.dark = getComputedStyle(probe).color === "rgb(255, 255, 255)";
    probe.remove();
    const stops = VIRIDIS.map((hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16)));
    this.shades = Array.from({ length: SHADES }, (_, i) => {
      const t = i / (SHADES - 1);
      const at = (this.dark ? 1 - 0.78 * t : t) * (stops.length - 1);
      const under = Math.min(stops.length - 2, Math.floor(at));
      const mixed = stops[under].map((c, k) => Math.round(c + (stops[under + 1][k] - c) * (at - under)));
      return `rgb(${mixed.join(" ")})`;
    });
    this.request();
  }

  shade(node) {
    return this.shades[Math.round(this.badness(node) * (SHADES - 1))];
  }

  resize() {
    const { clientWidth: width, clientHeight: height } = this.canvas;
    const ratio = window.devicePixelRatio || 1;
    this.canvas.width = Math.max(1, Math.round(width * ratio));
    this.canvas.height = Math.max(1, Math.round(height * ratio));
    this.size = { width, height, ratio };
    this.layOut(width, height);
  }

  listen() {
    const canvas = this.canvas;
    const down = new Map();
    let moved = 0;
    const place = (event) => [event.offsetX, event.offsetY];
    const spread = () => {
      const [a, b] = [...down.values()];
      return Math.hypot(a[0] - b[0], a[1] - b[1]);
    };
    canvas.addEventListener("pointerdown", (event) => {
      canvas.setPointerCapture(event.pointerId);
      down.set(event.pointerId, place(event));
      moved = down.size > 1 ? Infinity : 0;
    });
    canvas.addEventListener("pointermove", (event) => {
      const before = down.get(event.pointerId);
      const now = place(event);
      if (!before) {
        this.hover(this.hit(...now));
        return;
      }
      const [dx, dy] = [now[0] - before[0], now[1] - before[1]];
      moved += Math.abs(dx) + Math.abs(dy);
      if (moved < 4) return; // a hand that trembles does not drag
      canvas.classList.add("dragging");
      const was = down.size === 2 ? spread() : 0;
      down.set(event.pointerId, now);
      this.pan(dx / down.size, dy / down.size);
      if (was) {
        const [a, b] = [...down.values()];
        this.zoom(spread() / was, (a[0] + b[0]) / 2, (a[1] + b[1]) / 2);
      }
    });
    const up = (event) => {
      if (down.delete(event.pointerId) && moved < 4 && event.type === "pointerup") {
        const node = this.hit(...place(event));
        if (node) this.pick(node);
      }
      if (!down.size) canvas.classList.remove("dragging");
    };
    canvas.addEventListener("pointerup", up);
    canvas.addEventListener("pointercancel", up);
    canvas.addEventListener("pointerleave", () => this.hover(null));
    canvas.addEventListener("dblclick", () => this.fit());
    const wheel = (event) => {
      event.preventDefault();
      const lines = event.deltaMode === 1 ? 24 : 1;
      const turn = event.deltaY || event.deltaX; // Shift turns the wheel sideways
      const factor = Math.exp(-Math.max(-80, Math.min(80, turn * lines)) / 320);
      this.zoom(factor, ...place(event), event.shiftKey);
    };
    canvas.addEventListener("wheel", wheel, { passive: false });
    new ResizeObserver(() => this.resize()).observe(canvas);
    this.resize();
    // Another screen, or the browser's own zoom.
    const watch = () =>
      matchMedia(`(resolution: ${window.devicePixelRatio}dppx)`).addEventListener(
        "change",
        () => {
          this.resize();
          watch();
        },
        { once: true },
      );
    watch();
  }

  hover(node) {
    if (node === this.over) return;
    this.over = node;
    this.canvas.classList.toggle("over", node !== null);
    this.request();
  }

  // ---- Drawing

  request() {
    if (this.waiting) return;
    this.waiting = true;
    requestAnimationFrame(() => {
      this.waiting = false;
      const started = performance.now();
      this.draw();
      this.frames.count++;
      this.frames.milliseconds += performance.now() - started;
    });
  }

  draw() {
    if (!this.box || !this.colours || this.size.width < 1) return;
    const c = this.context;
    const { width, height, ratio } = this.size;
    c.setTransform(ratio, 0, 0, ratio, 0, 0);
    c.fillStyle = this.colours.page;
    c.fillRect(0, 0, width, height);
    this.drawAxes();
    this.drawBand();
    this.drawStrip();
    const { left, right, top, low } = this.box;
    const visible = this.lineage.nodes.filter((node) => !this.shown.hidden(node));
    const edge = this.above.length ? BAND + 4 : 0;
    this.clipped([left - 8, top - 2, right - left + 16, low - top + 4], () => this.drawEdges(visible));
    this.clipped([left - 8, top - edge, right - left + 16, this.box.bottom - top + edge], () => this.drawFamily());
    this.clipped([left - 8, top - edge, right - left + 16, low - top + edge + 4], () => this.drawPath());
    this.clipped([left - 8, top - 8, right - left + 16, low - top + 16], () =>
      this.drawNodes(visible.filter((node) => node.status === "evaluated" && !node.above)),
    );
    this.clipped([left - 8, 0, right - left + 16, height], () => {
      this.drawNodes(visible.filter((node) => node.above));
      this.drawDead(visible.filter((node) => node.status !== "evaluated"));
    });
    this.drawRings();
    this.drawLabels();
  }

  clipped(rectangle, action) {
    this.context.save();
    this.context.beginPath();
    this.context.rect(...rectangle);
    this.context.clip();
    action();
    this.context.restore();
  }

  text(words, x, y, { align = "left", colour = "soft", bold = false, halo = false, size = 12 } = {}) {
    const c = this.context;
    c.font = `${bold ? 600 : 400} ${size}px ${this.font}`;
    c.textAlign = align;
    c.textBaseline = "middle";
    if (halo) {
      c.lineWidth = 4;
      c.lineJoin = "round";
      c.strokeStyle = this.colours.page;
      c.strokeText(words, x, y);
    }
    c.fillStyle = this.colours[colour];
    c.fillText(words, x, y);
  }

  line(points, colour, width, dash = []) {
    const c = this.context;
    c.beginPath();
    points.forEach(([x, y], i) => (i ? c.lineTo(x, y) : c.moveTo(x, y)));
    c.strokeStyle = colour;
    c.lineWidth = width;
    c.setLineDash(dash);
    c.stroke();
    c.setLineDash([]);
  }

  drawAxes() {
    const { left, right, top, low, bottom } = this.box;
    const { x0, x1, y0, y1 } = this.view;
    const caption = `${this.lineage.measure}, log scale; lower is better`;
    this.context.font = `400 12px ${this.font}`;
    const fits = this.context.measureText(caption).width < right - 20;
    this.text(fits ? caption : "perplexity, log scale; lower is better", 20, 20);
    for (const tick of perplexityTicks(
      y0,
      this.above.length ? Math.min(y1, this.cut) : y1,
      Math.max(2, Math.floor((low - top) / 46)),
    )) {
      const y = Math.round(this.screenY(Math.log(tick))) + 0.5;
      this.line(
        [
          [left, y],
          [right, y],
        ],
        this.colours.line,
        1,
      );
      this.text(plainNumber(tick), left - 12, y, { align: "right" });
    }
    const most = Math.max(1, Math.floor((right - left) / 40));
    const step = Math.max(1, evenTicks(0, x1 - x0, most)[1] ?? 1);
    for (let g = Math.ceil(Math.max(0, x0) / step) * step; g <= Math.min(x1, this.lineage.last); g += step) {
      const x = this.screenX(g);
      this.text(String(g), x, bottom + 13, { align: "center" });
      if (step > 1)
        this.line(
          [
            [x, bottom],
            [x, bottom + 4],
          ],
          this.colours.quiet,
          1,
        );
    }
    if ((right - left) / (x1 - x0) > 26)
      for (let g = Math.floor(x0); g <= Math.min(x1, this.lineage.last); g++) {
        const x = Math.round(this.screenX(g + 0.5)) + 0.5;
        if (x > left && x < right)
          this.line(
            [
              [x, top],
              [x, bottom],
            ],
            this.colours.line,
            1,
            [1, 4],
          );
      }
    this.text("generation (0: the seeds)", (left + right) / 2, bottom + 31, { align: "center" });
  }

  drawBand() {
    if (!this.above.length) return;
    const { left, right, top } = this.box;
    this.context.fillStyle = this.colours.line;
    this.context.globalAlpha = 0.45;
    this.context.fillRect(left, top - BAND, right - left, BAND - 6);
    this.context.globalAlpha = 1;
    this.text(`> ${plainNumber(Math.exp(this.cut))}`, left - 12, top - BAND / 2 - 3, { align: "right" });
  }

  drawStrip() {
    const { left, right, strip } = this.box;
    this.lanes.forEach((status, lane) => {
      const y = strip + (lane + 0.5) * LANE;
      this.line(
        [
          [left, Math.round(y) + 0.5],
          [right, Math.round(y) + 0.5],
        ],
        this.colours.line,
        1,
      );
      this.text(status, left - 12, y, { align: "right" });
    });
  }

  curve(parent, child) {
    const [x0, y0] = this.at(parent);
    const [x1, y1] = this.at(child);
    const middle = (x0 + x1) / 2;
    this.context.moveTo(x0, y0);
    this.context.bezierCurveTo(middle, y0, middle, y1, x1, y1);
  }

  // Between measured candidates only: a line to each dead end would hide all others.
  drawEdges(visible) {
    const c = this.context;
    const { nodes } = this.lineage;
    const { x0, x1 } = this.view;
    c.beginPath();
    for (const child of visible) {
      if (child.status !== "evaluated" || child.above) continue;
      for (const place of child.parents) {
        const parent = nodes[place];
        if (parent.status !== "evaluated" || parent.above || this.shown.hidden(parent)) continue;
        if (Math.max(parent.x, child.x) >= x0 && Math.min(parent.x, child.x) <= x1) this.curve(parent, child);
      }
    }
    c.strokeStyle = this.colours.quiet;
    c.globalAlpha = this.shown.matches ? 0.12 : Math.min(0.45, Math.max(0.14, 14 / Math.sqrt(this.density) / 2));
    c.lineWidth = 1;
    c.stroke();
    c.globalAlpha = 1;
  }

  // All ancestors of the selected candidate, and its children.
  drawFamily() {
    const selected = this.shown.selected;
    const c = this.context;
    const { nodes } = this.lineage;
    if (!selected) return;
    c.beginPath();
    for (const child of [selected, ...this.shown.ancestors])
      for (const place of child.parents) if (!this.shown.hidden(nodes[place])) this.curve(nodes[place], child);
    c.strokeStyle = this.colours.ink;
    c.globalAlpha = 0.5;
    c.lineWidth = 1.1;
    c.stroke();
    // Fainter to the dead ends: a good parent has many.
    for (const measured of [true, false]) {
      c.beginPath();
      for (const child of selected.children)
        if ((child.status === "evaluated") === measured && !this.shown.hidden(child)) this.curve(selected, child);
      c.globalAlpha = measured ? 0.45 : 0.15;
      c.lineWidth = 1;
      c.stroke();
    }
    c.globalAlpha = 1;
  }

  drawPath() {
    const c = this.context;
    const path = this.lineage.path;
    c.beginPath();
    for (let i = 1; i < path.length; i++)
      if (!this.shown.hidden(path[i - 1]) && !this.shown.hidden(path[i])) this.curve(path[i - 1], path[i]);
    c.globalAlpha = this.shown.matches ? 0.3 : 1;
    c.strokeStyle = this.colours.page;
    c.lineWidth = 5;
    c.stroke();
    c.strokeStyle = this.colours.accent;
    c.lineWidth = 2.4;
    c.stroke();
    c.globalAlpha = 1;
  }

  // The best come last, so that they lie on top.
  drawNodes(nodes) {
    const c = this.context;
    const r = this.radius;
    const matches = this.shown.matches;
    c.lineWidth = r < 5 ? 0.7 : 1;
    for (const node of nodes.sort((a, b) => b.nats - a.nats)) {
      const place = this.at(node);
      if (!this.inside(node, place)) continue;
      c.globalAlpha = matches && !matches.has(node) ? 0.13 : 1;
      c.beginPath();
      trace(c, node.operator, ...place, r);
      c.fillStyle = this.shade(node);
      c.fill();
      c.strokeStyle = this.colours.page;
      c.stroke();
    }
    c.globalAlpha = 1;
  }

  drawDead(nodes) {
    const c = this.context;
    const matches = this.shown.matches;
    for (const bright of matches ? [false, true] : [true])
      for (const grave of [false, true]) {
        c.beginPath();
        for (const node of nodes) {
          if ((node.status === "failed" || node.status === "poison") !== grave) continue;
          if (matches && matches.has(node) !== bright) continue;
          const [x, y] = this.at(node);
          c.moveTo(x - 2.5, y - 2.5);
          c.lineTo(x + 2.5, y + 2.5);
          c.moveTo(x + 2.5, y - 2.5);
          c.lineTo(x - 2.5, y + 2.5);
        }
        c.strokeStyle = grave ? this.colours.bad : this.colours.soft;
        c.globalAlpha = bright ? 0.8 : 0.15;
        c.lineWidth = 1.2;
        c.stroke();
      }
    c.globalAlpha = 1;
  }

  drawRings() {
    const c = this.context;
    const r = this.radius;
    const { matches, selected, hidden } = this.shown;
    const ring = (node, colour, size, width) => {
      const place = this.at(node);
      if (hidden(node) || !this.inside(node, place)) return;
      c.beginPath();
      c.arc(...place, size, 0, 2 * Math.PI);
      c.strokeStyle = colour;
      c.lineWidth = width;
      c.stroke();
    };
    if (matches)
      for (const node of matches) ring(node, this.colours.accent, (node.status === "evaluated" ? r : 3) + 2.5, 1.1);
    ring(this.lineage.best, this.colours.accent, r + 4, 2);
    if (selected) {
      ring(selected, this.colours.page, r + 6.5, 5);
      ring(selected, this.colours.ink, r + 6.5, 2.2);
    }
    if (this.over && this.over !== selected) ring(this.over, this.colours.ink, r + 4.5, 1.2);
  }

  // Names where there is room for them: of what is pointed at, of what is selected, and along the best path from its end.
  drawLabels() {
    const c = this.context;
    const r = this.radius;
    const taken = [];
    const { left, right } = this.box;
    const wanted = [this.over, this.shown.selected, ...[...this.lineage.path].reverse()].filter(Boolean);
    for (const node of new Set(wanted)) {
      const place = this.at(node);
      if (this.shown.hidden(node) || !this.inside(node, place)) continue;
      const named = node === this.over || node === this.shown.selected || node === this.lineage.best;
      const words = [node.id, node.status === "evaluated" ? perplexityText(node.nats) : node.status];
      c.font = `600 12px ${this.font}`;
      const width = Math.max(...words.map((word) => c.measureText(word).width));
      const x = Math.min(right - width / 2, Math.max(left + width / 2, place[0]));
      const sides = node.status === "evaluated" ? [1, -1] : [-1, 1];
      for (const side of sides) {
        const y = place[1] + side * (r + 21);
        const box = [x - width / 2 - 5, y - 15, x + width / 2 + 5, y + 15];
        const free = taken.every((o) => box[0] > o[2] || box[2] < o[0] || box[1] > o[3] || box[3] < o[1]);
        if (!free || (!named && this.crowded(box, node))) continue;
        taken.push(box);
        this.text(words[0], x, y - 7, { align: "center", colour: "ink", bold: true, halo: true });
        this.text(words[1], x, y + 7, { align: "center", colour: "ink", halo: true });
        break;
      }
    }
  }

  crowded(box, own) {
    return this.lineage.nodes.some((node) => {
      if (node === own || node.status !== "evaluated" || this.shown.hidden(node)) return false;
      const [x, y] = this.at(node);
      return x > box[0] && x < box[2] && y > box[1] && y < box[3];
    });
  }
}
