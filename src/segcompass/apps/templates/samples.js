"use strict";
// Behaviour of the page: which samples are shown, and in which order. The state is the form's.

const form = document.querySelector(".filters");
const grid = document.querySelector(".grid");
const samples = [...grid.children];
const buttons = [...form.querySelectorAll("[data-group]")];
const field = (name) => form.elements[name]?.value ?? "";
let group = "worst";

// What each group is about decides its order, unless another is asked for.
const ORDER = { worst: "iou", best: "-iou", doubtful: "margin", random: "number", "": "number" };

const searched = new Map(samples.map((sample) => [sample, sample.textContent.toLowerCase()]));

function fits(sample) {
  const { groups, kind, status, targets, iou } = sample.dataset;
  return (
    (!group || groups.split(" ").includes(group)) &&
    (!field("kind") || kind === field("kind")) &&
    (!field("status") || status === field("status")) &&
    (!field("targets") || targets === field("targets")) &&
    Number(iou) >= Number(field("low")) &&
    Number(iou) <= (field("high") === "" ? 1 : Number(field("high"))) &&
    searched.get(sample).includes(field("text").trim().toLowerCase())
  );
}

function show() {
  const asked = field("sort") === "group" ? ORDER[group] : field("sort");
  const key = asked.replace("-", "");
  const sign = asked.startsWith("-") ? -1 : 1;
  const value = (sample) => (sample.dataset[key] === "" ? Infinity : sign * Number(sample.dataset[key]));
  const area = (sample) => Number(sample.dataset.union);
  const compare = (a, b) => {
    const [left, right] = [value(a), value(b)];
    return left === right ? area(b) - area(a) || a.dataset.number - b.dataset.number : left - right;
  };
  let count = 0;
  for (const sample of samples) {
    sample.hidden = !fits(sample);
    count += !sample.hidden;
  }
  grid.append(...samples.sort(compare));
  for (const button of buttons) button.setAttribute("aria-pressed", button.dataset.group === group);
  document.querySelector(".found").textContent = count
    ? `${count} of ${samples.length} samples on this page`
    : "No sample on this page fits; loosen a filter.";
}

for (const button of buttons)
  button.onclick = () => {
    group = button.dataset.group;
    show();
  };
form.oninput = show;
form.onsubmit = (event) => event.preventDefault();
form.hidden = false;
if (matchMedia("(max-width: 820px)").matches) form.querySelector(".more").open = false;
show();
