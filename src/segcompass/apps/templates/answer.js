// What the web page's answer adds to the report: concepts filtered by word or patch, and turned up
// or down. It reads the report's own state off the page, after the report has dealt with a click.

function workbench(card) {
  const all = (selector) => [...card.querySelectorAll(selector)];
  const one = (selector) => card.querySelector(selector);
  const { width, height, boxes, concepts } = JSON.parse(one(".data").textContent);
  const rows = all("tr[data-concept]");
  const factors = new Map(); // concept -> factor, where it is not 1
  const stage = one("[data-main]");

  /** Show the concepts that fire at a place, 1 for patches and 2 for words; all of them for null. */
  function filter(place, index, name) {
    const fires = (row) => pairs(concepts[row.dataset.concept][place]).some(([at]) => at === index);
    for (const row of rows) row.hidden = place === null ? row.classList.contains("further") : !fires(row);
    const listed = rows.filter((row) => !row.closest("table").hidden);
    const left = listed.filter((row) => !row.hidden).length;
    one(".filter span").textContent = place === null ? "" : `Of the ${listed.length} heaviest concepts, ${left || "none"} fire${left === 1 ? "s" : ""} on ${name}.`;
    one(".filter .clear").hidden = place === null;
  }

  card.addEventListener("click", (event) => {
    if (event.target.closest(".workbench, .views, .share")) return;
    const word = event.target.closest(".w");
    if (!card.classList.contains("focused")) filter(null);
    else if (word) filter(2, Number(word.dataset.word), `“${word.textContent}”`);
    else if (stage.contains(event.target)) {
      const frame = stage.getBoundingClientRect();
      const x = ((event.clientX - frame.left) / frame.width) * width;
      const y = ((event.clientY - frame.top) / frame.height) * height;
      const patch = boxes.findIndex(([x0, y0, x1, y1]) => x >= x0 && x < x1 && y >= y0 && y < y1);
      filter(1, patch, `patch ${patch + 1} of ${boxes.length}`);
    }
  });
  card.addEventListener("keydown", (event) => event.key === "Escape" && filter(null));

  // The arrow keys move over the patches as the mouse does, and Enter picks one.
  const cursor = document.createElement("span");
  const columns = boxes.filter(([, y0]) => y0 === boxes[0][1]).length;
  let patch = 0;
  cursor.className = "cursor";
  stage.append(cursor);
  stage.tabIndex = 0;
  stage.setAttribute("role", "application");
  stage.setAttribute("aria-label", "The picture: arrow keys move over its patches, Enter follows the concepts of one");
  stage.onkeydown = (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: columns, ArrowUp: -columns }[event.key];
    if (!step && event.key !== "Enter") return;
    event.preventDefault();
    if (boxes[patch + step]) patch += step;
    const [x0, y0, x1, y1] = boxes[patch];
    const place = { left: x0 / width, top: y0 / height, width: (x1 - x0) / width, height: (y1 - y0) / height };
    for (const [side, share] of Object.entries(place)) cursor.style[side] = `${100 * share}%`;
    const frame = stage.getBoundingClientRect();
    const clientX = frame.left + ((x0 + x1) / 2 / width) * frame.width;
    const clientY = frame.top + ((y0 + y1) / 2 / height) * frame.height;
    stage.dispatchEvent(new MouseEvent(step ? "mousemove" : "click", { bubbles: true, clientX, clientY }));
  };
  one(".filter .clear").addEventListener("click", () => filter(null));

  function turn(concept, factor) {
    if (factor === 1) factors.delete(concept);
    else factors.set(concept, factor);
    for (const row of rows.filter((row) => row.dataset.concept === concept)) {
      row.querySelector("[type=checkbox]").checked = factor > 0;
      row.querySelector("[type=range]").value = factor;
      row.querySelector("output").textContent = factor ? `×${factor}` : "off";
      row.classList.toggle("edited", factor !== 1);
    }
    if (!one(".rerun")) return;
    one(".go").disabled = one(".reset").disabled = !factors.size;
    one(".changed").textContent = factors.size ? `${factors.size} changed.` : "Nothing changed.";
  }

  for (const row of rows) {
    const { concept } = row.dataset;
    row.querySelector("[type=checkbox]").onchange = (event) => turn(concept, Number(event.target.checked));
    row.querySelector("[type=range]").oninput = (event) => turn(concept, Number(event.target.value));
  }
  if (!one(".rerun")) return;
  one(".reset").onclick = () => [...factors.keys()].forEach((concept) => turn(concept, 1));
  one(".go").onclick = () => parent.postMessage({ edits: Object.fromEntries(factors) }, "*");
}

document.querySelectorAll(".card:has(.workbench)").forEach(workbench);
