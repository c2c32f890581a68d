"use strict";
// Behaviour of the report. Every card has one state (which slot, which concept, which layers) and
// one function, show(), that brings the page in line with it. Data comes from the card's JSON.

const MARKER = getComputedStyle(document.documentElement).getPropertyValue("--marker").trim();
const tip = document.getElementById("tip");

function explain(card) {
  const all = (selector) => [...card.querySelectorAll(selector)];
  const one = (selector) => card.querySelector(selector);
  const data = JSON.parse(one(".data").textContent);
  const slots = all(".slot");
  const accepted = slots.filter((slot) => !slot.classList.contains("rejected"));
  const counted = accepted.length ? accepted : slots;
  const words = all(".w");
  const shades = words.map((word) => word.style.getPropertyValue("--a"));
  const on = all("[data-layer][aria-pressed=true]").map((button) => button.dataset.layer);
  const state = { slot: null, concept: null, lent: false, layers: new Set(on), share: 20 };

  // Concepts per image token, strongest first: the reverse of data.concepts.
  const onToken = data.boxes.map(() => []);
  for (const [id, [scale, tokens]] of Object.entries(data.concepts))
    for (const [token, level] of pairs(tokens)) onToken[token].push([Number(id), (level / 99) * scale]);
  for (const list of onToken) list.sort((a, b) => b[1] - a[1]).splice(3);

  // Small stages under the picture: the way to the masks, and the switches of its layers.
  const main = one("[data-main]");
  const stages = [{ stage: main, layers: state.layers }];
  for (const button of all("[data-layer]")) {
    const stage = button.querySelector(".stage");
    for (const layer of main.children) stage.append(layer.cloneNode(true));
    stages.push({ stage, layers: new Set([button.dataset.layer]) });
    button.onclick = () => {
      const layer = button.dataset.layer;
      if (!state.layers.delete(layer)) state.layers.add(layer);
      state.lent &&= layer !== "tokens";
      show();
    };
  }
  for (const views of all(".views")) views.hidden = false;

  const inView = (slot) => (state.slot === null ? counted.some((s) => s.dataset.slot === slot) : state.slot === slot);

  /** The image tokens to mark: [token, level in 0..1, colour]. */
  function marks() {
    if (state.concept !== null) {
      const [, tokens] = data.concepts[state.concept];
      return pairs(tokens).map(([token, level]) => [token, level / 99, MARKER]);
    }
    const strongest = new Map(); // token -> [level, colour]: one square each, in its strongest slot's colour
    for (const slot of slots.filter((slot) => inView(slot.dataset.slot))) {
      const heat = data.heat[slot.dataset.slot];
      // Strictly above the first one left out: ties are left out together.
      const floor = [...heat].sort((a, b) => b - a)[Math.ceil((heat.length * state.share) / 100)] ?? 0;
      for (const [token, level] of heat.entries())
        if (level > floor && level > (strongest.get(token)?.[0] ?? 0))
          strongest.set(token, [level, slot.style.getPropertyValue("--c")]);
    }
    return [...strongest].map(([token, [level, colour]]) => [token, level / 99, colour]);
  }

  function paint(canvas) {
    const ratio = window.devicePixelRatio || 1;
    canvas.width = Math.round(canvas.clientWidth * ratio);
    canvas.height = Math.round(canvas.clientHeight * ratio);
    const pen = canvas.getContext("2d");
    pen.scale(canvas.width / data.width, canvas.height / data.height);
    const px = (data.width / canvas.width) * ratio;
    for (const [token, level, colour] of marks()) {
      const [x0, y0, x1, y1] = data.boxes[token];
      pen.fillStyle = pen.strokeStyle = colour;
      pen.beginPath();
      const gap = Math.min(px, (x1 - x0) / 8); // small squares keep most of their area
      pen.lineWidth = gap;
      pen.roundRect(x0 + gap, y0 + gap, x1 - x0 - 2 * gap, y1 - y0 - 2 * gap, 2 * gap);
      pen.globalAlpha = 0.12 + 0.6 * level;
      pen.fill();
      pen.globalAlpha = 0.35 + 0.65 * level;
      pen.stroke();
    }
  }

  function show() {
    for (const { stage, layers } of stages) {
      const tokens = layers.has("tokens");
      stage.classList.toggle("dim", tokens || layers.has("heat"));
      stage.classList.toggle("traced", tokens);
      for (const [kind, layer] of [[".mask", "masks"], [".heat", "heat"], [".prompt", "prompt"]])
        for (const image of stage.querySelectorAll(kind))
          image.toggleAttribute("hidden", !(layers.has(layer) && inView(image.dataset.slot)));
      for (const canvas of stage.querySelectorAll(".tokens")) {
        canvas.hidden = !tokens;
        if (tokens) paint(canvas);
      }
    }
    for (const button of all("[data-layer]"))
      button.setAttribute("aria-pressed", state.layers.has(button.dataset.layer));
    for (const slot of slots) slot.setAttribute("aria-pressed", slot.dataset.slot === state.slot);
    for (const list of all(".concepts")) list.hidden = list.dataset.slot !== (state.slot ?? "all");
    for (const chip of all(".chip")) chip.setAttribute("aria-pressed", Number(chip.dataset.concept) === state.concept);
    for (const name of all(".of"))
      name.textContent = state.slot !== null ? `slot ${state.slot}` : accepted.length ? "accepted slots" : "all slots";
    for (const share of all(".share")) share.hidden = state.concept !== null || !state.layers.has("tokens");
    one(".clear").hidden = state.concept === null && state.slot === null;
    shade();
    say();
  }

  function shade() {
    card.classList.toggle("focused", state.concept !== null);
    const levels = new Map(state.concept === null ? [] : pairs(data.concepts[state.concept][2]));
    words.forEach((word, i) => {
      const level = state.concept === null ? shades[i] : (levels.get(Number(word.dataset.word)) ?? 0) / 99;
      word.style.setProperty("--a", level);
    });
  }

  function say() {
    const now = one(".now");
    if (state.concept !== null) {
      const [, tokens, onWords] = data.concepts[state.concept];
      const fired = pairs(onWords).sort((a, b) => b[1] - a[1]).map(([word]) => words[word].textContent);
      const names = [...new Set(fired)];
      const listed = names.slice(0, 5).map((name) => `“${name}”`).join(", ") + (names.length > 5 ? ", …" : "");
      now.replaceChildren(bold(`Concept ${state.concept}`), ` fires on ${tokens.length / 2} of ${data.boxes.length} image tokens`,
        listed ? ` and on ${listed}.` : " and on no word.");
    } else if (state.slot !== null) {
      const slot = slots.find((s) => s.dataset.slot === state.slot);
      const verdict = slot.classList.contains("rejected") ? ", below the threshold: it gives no mask." : ", accepted.";
      now.replaceChildren(bold(`Slot ${state.slot}`), ` has confidence ${slot.querySelector(".score").textContent}${verdict}`);
    } else {
      const rest = data.boxes.length ? ", a word, a concept or a spot in the picture" : "";
      now.replaceChildren(slots.length ? `Pick a slot${rest} to follow it.` : "");
    }
  }

  /** Follow a concept, or none (null). Its tokens are shown for as long as it is followed. */
  function choose(concept) {
    if (concept !== null && !state.layers.has("tokens")) {
      state.layers.add("tokens");
      state.lent = true;
    } else if (concept === null && state.lent) {
      state.layers.delete("tokens");
      state.lent = false;
    }
    state.concept = concept;
    show();
  }

  /** Step through a list of concepts: the first, the next on every further pick, then none. */
  function step(list) {
    const at = list.findIndex(([concept]) => concept === state.concept);
    choose(at + 1 < list.length ? list[at + 1][0] : null);
  }

  for (const slot of slots)
    slot.onclick = () => {
      state.slot = state.slot === slot.dataset.slot ? null : slot.dataset.slot;
      choose(null);
    };
  for (const chip of all(".chip"))
    chip.onclick = () => choose(Number(chip.dataset.concept) === state.concept ? null : Number(chip.dataset.concept));
  one(".clear").onclick = () => {
    state.slot = null;
    choose(null);
  };
  card.addEventListener("keydown", (event) => {
    if (event.key !== "Escape") return;
    if (state.concept === null) state.slot = null;
    choose(null);
  });
  for (const slider of all(".share input"))
    slider.oninput = () => {
      state.share = Number(slider.value);
      one(".share output").textContent = state.share;
      show();
    };

  for (const word of words) {
    const list = data.words[word.dataset.word];
    if (!list.length) continue;
    word.setAttribute("role", "button");
    word.tabIndex = -1;
    word.onclick = () => step(list);
    word.onmouseenter = word.onfocus = () => point(word.getBoundingClientRect(), list, word);
    word.onmouseleave = word.onblur = () => (tip.hidden = true);
  }
  for (const group of all(".words")) rove([...group.querySelectorAll("[role=button]")]);

  const tokenAt = (event) => {
    const frame = main.getBoundingClientRect();
    const x = ((event.clientX - frame.left) / frame.width) * data.width;
    const y = ((event.clientY - frame.top) / frame.height) * data.height;
    return data.boxes.findIndex(([x0, y0, x1, y1]) => x >= x0 && x < x1 && y >= y0 && y < y1);
  };
  main.onclick = (event) => step(onToken[tokenAt(event)] ?? []);
  main.onmousemove = (event) => {
    const list = onToken[tokenAt(event)] ?? [];
    tip.hidden = true;
    if (list.length) point(new DOMRect(event.clientX, event.clientY - 6, 0, 22), list);
  };
  main.onmouseleave = () => (tip.hidden = true);

  new ResizeObserver(show).observe(main);
}

/** [a, b, c, d, …] as [[a, b], [c, d], …]. */
function pairs(flat) {
  return Array.from({ length: flat.length / 2 }, (_, i) => [flat[2 * i], flat[2 * i + 1]]);
}

function bold(text) {
  return Object.assign(document.createElement("b"), { textContent: text });
}

/** One stop of the tab key for a group; the arrow keys move inside it, Enter and Space pick. */
function rove(items) {
  if (!items.length) return;
  items[0].tabIndex = 0;
  items.forEach((item, i) => {
    item.onkeydown = (event) => {
      const target = { ArrowRight: i + 1, ArrowLeft: i - 1, Home: 0, End: items.length - 1 }[event.key];
      if (event.key === "Enter" || event.key === " ") item.click();
      else if (!items[target]) return;
      else {
        item.tabIndex = -1;
        items[target].tabIndex = 0;
        items[target].focus();
      }
      event.preventDefault();
    };
  });
}

/** Show a list of [concept, activation] above a place in the window. */
function point(place, list, owner) {
  tip.replaceChildren(...list.map(([concept, weight]) => {
    const row = document.createElement("div");
    const bar = document.createElement("i");
    const track = document.createElement("span");
    bar.style.setProperty("--w", weight / list[0][1]);
    track.append(bar);
    row.append(bold(concept), track, weight.toFixed(2));
    return row;
  }));
  tip.hidden = false;
  if (owner) owner.setAttribute("aria-describedby", "tip");
  const { width, height } = tip.getBoundingClientRect();
  const left = Math.min(Math.max(8, place.left + place.width / 2 - width / 2), document.documentElement.clientWidth - width - 8);
  const above = place.top - height - 6;
  tip.style.left = `${left + window.scrollX}px`;
  tip.style.top = `${(above > 4 ? above : place.bottom + 6) + window.scrollY}px`;
}

document.querySelectorAll(".card").forEach(explain);

// The contents show which card is being read.
const seen = new IntersectionObserver((entries) => {
  for (const { isIntersecting, target } of entries) {
    const link = document.querySelector(`.contents a[href="#${target.id}"]`);
    if (!link || !isIntersecting) continue;
    document.querySelectorAll(".contents [aria-current]").forEach((a) => a.removeAttribute("aria-current"));
    link.setAttribute("aria-current", "true");
  }
}, { rootMargin: "-30% 0px -65% 0px" });
document.querySelectorAll(".card").forEach((card) => seen.observe(card));
