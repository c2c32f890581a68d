"use strict";
// Thousands of concepts, of which only those in view are in the document: cards are built in batches
// from compact rows, and pictures are cut from a few sheets.

const data = JSON.parse(document.getElementById("data").textContent);
const BATCH = 24;
const [seek, reach, family, order, count, list, more] =
  ["seek", "reach", "family", "order", "count", "cards", "more"].map((id) => document.getElementById(id));
const byNumber = new Map(data.cards.map((row) => [row.id, row]));
const haystack = new Map(data.cards.map((row) => [row.id, [row.label, ...row.words.map(([word]) => word)].join(" ").toLowerCase()]));
let found = [], shown = 0;

for (const name of data.families) family.append(new Option(name, name));

/** An element with properties and children; text is always text. */
function el(tag, properties = {}, ...children) {
  const { style, ...rest } = properties;
  const node = Object.assign(document.createElement(tag), rest);
  for (const [name, value] of Object.entries(style ?? {})) node.style.setProperty(name, value);
  node.append(...children);
  return node;
}

const percent = (share) => (share >= 0.0995 ? (100 * share).toFixed(0) : (100 * share).toPrecision(2)) + " %";

function fits(row, words, number) {
  if (number !== null) return row.id === number;
  if (reach.value && row.reach !== reach.value) return false;
  if (family.value === "*" && row.f1 < data.clear) return false;
  if (family.value && family.value !== "*" && (row.family !== family.value || row.f1 < data.clear)) return false;
  return words.every((word) => haystack.get(row.id).includes(word) || String(row.id) === word);
}

/** Bring the list in line with the controls. */
function search() {
  const asked = seek.value.trim().toLowerCase();
  const number = /^#\d+$/.test(asked) ? Number(asked.slice(1)) : null;
  const words = asked.split(/\s+/).filter(Boolean);
  const key = order.value;
  found = data.cards.filter((row) => fits(row, words, number));
  found.sort((a, b) => (key === "id" ? 0 : b[key] - a[key]) || a.id - b.id);
  const few = found.length === 1 ? "concept" : "concepts";
  count.textContent = `${found.length.toLocaleString("en")} ${few}`;
  list.replaceChildren();
  shown = 0;
  grow();
}

function grow() {
  list.append(...found.slice(shown, shown + BATCH).map(card));
  shown = Math.min(shown + BATCH, found.length);
  more.hidden = shown === found.length;
}

function card(row) {
  const holds = row.f1 >= data.clear;
  const parts = [
    el("header", {},
      el("p", { className: "kicker" },
        el("a", { href: `#c${row.id}`, textContent: `#${row.id}`, title: "Link to this concept" }),
        el("span", { className: `badge ${row.reach}`, textContent: row.reach === "image" ? "pictures" : row.reach }),
        el("span", { textContent: `on ${percent(row.density)} of tokens` })),
      el("h2", { textContent: row.label, dir: "auto" }),
      scores(row)),
  ];
  if (row.patches.length) parts.push(el("div", { className: "patches", role: "img", ariaLabel: `${row.patches.length} picture patches on which it fires most` }, ...row.patches.map(patch)));
  if (row.words.length) parts.push(el("ul", { className: "words", ariaLabel: "Words" }, ...row.words.map(([word, share]) =>
    el("li", { className: "word", textContent: word, title: percent(share), style: { "--w": share } }))));
  if (row.mentions.length) parts.push(el("ul", { className: "mentions", ariaLabel: "In context" }, ...row.mentions.map(([before, token, after, value]) =>
    el("li", { dir: "auto", title: `activation ${value}` }, before, el("mark", { textContent: token }), after))));
  parts.push(histogram(row));
  const company = [["Fires with", row.together], ["Points like", row.neighbours]].filter(([, others]) => others.length);
  if (company.length) parts.push(el("dl", {}, ...company.flatMap(([name, others]) => [
    el("dt", { textContent: name }),
    el("dd", {}, ...others.map(([id, value]) => related(id, value))),
  ])));
  return el("li", { className: holds ? "concept" : "concept guess", id: `c${row.id}` }, ...parts);
}

function scores(row) {
  if (row.f1 < 0) return el("p", { className: "score-line", textContent: "not tested: it fires on one half of the pictures only" });
  const other = row.tested === row.label ? "" : `closest label: ${row.tested} · `;
  return el("p", { className: "score-line", title: `firing means an activation of at least ${row.threshold}` },
    other, "F1 ", el("b", { textContent: row.f1.toFixed(2) }), ` · precision ${row.precision.toFixed(2)} · recall ${row.recall.toFixed(2)}`);
}

function patch([picture, x0, y0, x1, y1, value]) {
  const [sheet, column, line, width, height] = data.pictures[picture];
  const mark = el("i", { style: {
    left: `${(x0 * width) / 1000}px`, top: `${(y0 * height) / 1000}px`,
    width: `${((x1 - x0) * width) / 1000}px`, height: `${((y1 - y0) * height) / 1000}px`,
  } });
  return el("div", { className: `patch sheet-${sheet}`, title: `activation ${value}`, style: {
    width: `${width}px`, height: `${height}px`,
    "background-position": `${-column * data.cell}px ${-line * data.cell}px`,
  } }, mark);
}

function related(id, value) {
  const other = byNumber.get(id);
  const button = el("button", { type: "button", className: "related", title: other ? other.label : "" }, `#${id}`, el("small", { textContent: value.toFixed(2) }));
  button.onclick = () => visit(id);
  return button;
}

/** Bars of the number of tokens by activation; those above the label's threshold are marked. */
function histogram(row) {
  const NS = "http://www.w3.org/2000/svg";
  const svg = document.createElementNS(NS, "svg");
  const first = row.histogram.findIndex(Boolean);
  const last = row.histogram.findLastIndex(Boolean);
  const bars = row.histogram.slice(first, last + 1);
  const most = Math.max(...bars);
  const step = 100 / Math.max(bars.length, 8);
  svg.setAttribute("class", "hist");
  svg.setAttribute("viewBox", "0 0 100 30");
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("role", "img");
  svg.setAttribute("aria-label", `Histogram of activations, up to ${row.largest}; ${row.fired[0] + row.fired[1]} tokens`);
  bars.forEach((n, i) => {
    const bar = document.createElementNS(NS, "rect");
    const height = n ? Math.max(1, (30 * n) / most) : 0;
    const place = { x: i * step, y: 30 - height, width: step * 0.86, height };
    for (const [name, value] of Object.entries(place)) bar.setAttribute(name, value);
    if (data.edges[first + i] >= row.threshold || !row.threshold) bar.setAttribute("class", "on");
    svg.append(bar);
  });
  const low = first ? data.edges[first].toPrecision(2) : "0";
  return el("div", {}, svg, el("div", { className: "axis" },
    el("span", { textContent: `activation ${low}` }),
    el("span", { textContent: `${row.fired[0].toLocaleString("en")} text, ${row.fired[1].toLocaleString("en")} picture tokens` }),
    el("span", { textContent: String(row.largest) })));
}

/** Show one concept alone; the way back is the browser's. */
function visit(id) {
  if (location.hash === `#c${id}`) follow();
  else location.hash = `c${id}`;
}

function follow() {
  const match = /^#c(\d+)$/.exec(location.hash);
  if (match) seek.value = `#${match[1]}`;
  else if (seek.value.startsWith("#")) seek.value = "";
  search();
  window.scrollTo(0, 0);
}

document.getElementById("controls").onsubmit = (event) => event.preventDefault();
seek.oninput = search;
for (const control of [reach, family, order]) control.onchange = () => {
  if (seek.value.startsWith("#")) seek.value = "";
  search();
};
more.onclick = () => {
  const first = shown;
  grow();
  list.children[first]?.querySelector("a")?.focus({ preventScroll: true });
};
document.addEventListener("keydown", (event) => {
  const typing = event.target.matches("input, select, textarea");
  if (event.key === "/" && !typing && !event.ctrlKey && !event.metaKey) {
    event.preventDefault();
    seek.focus();
    seek.select();
  }
});
window.addEventListener("hashchange", follow);
new IntersectionObserver((entries) => {
  if (entries.some((entry) => entry.isIntersecting) && !more.hidden) grow();
}, { rootMargin: "600px" }).observe(more);
follow();
