// What the page of `lines inspect` does beyond standing there: tables sort, fine-tunes and stacks go on and off, figures
// say their values, light turns to dark. Without it, the page reads the same.
"use strict";
(() => {
  const all = (selector, within = document) => [...within.querySelectorAll(selector)];

  // --- tables that sort ---

  const collator = new Intl.Collator("en", { numeric: true });

  // Below 0 if a comes first. What has no number comes last, whichever way it is sorted.
  function compare(a, b, numbers, sign) {
    if (!numbers) return sign * collator.compare(a.textContent, b.textContent);
    const [x, y] = [a, b].map((cell) => ("value" in cell.dataset ? Number(cell.dataset.value) : null));
    if (x === null || y === null) return (x === null) - (y === null);
    return sign * (x - y);
  }

  function sort(table, column, order) {
    all("th", table).forEach((heading, at) => {
      if (heading.hasAttribute("aria-sort")) heading.setAttribute("aria-sort", at === column ? order : "none");
    });
    const body = table.tBodies[0];
    const numbers = table.rows[0].cells[column].classList.contains("n");
    const sign = order === "descending" ? -1 : 1;
    const rows = [...body.rows].sort((a, b) => a.dataset.at - b.dataset.at);
    if (order !== "none") rows.sort((a, b) => compare(a.cells[column], b.cells[column], numbers, sign));
    body.append(...rows);
  }

  const next = { none: "ascending", ascending: "descending", descending: "none" };
  for (const table of all("table")) {
    const rows = table.tBodies[0].rows;
    if (rows.length < 2) continue;
    [...rows].forEach((row, at) => (row.dataset.at = at));
    all("th", table).forEach((heading, column) => {
      if (rows[0].cells[column].classList.contains("bar-cell")) return;
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = heading.textContent;
      if (!heading.textContent) button.setAttribute("aria-label", "name");
      button.addEventListener("click", () => sort(table, column, next[heading.getAttribute("aria-sort")]));
      heading.setAttribute("aria-sort", "none");
      heading.replaceChildren(button);
    });
  }

  // --- fine-tunes and stacks to switch on and off ---

  const off = { model: new Set(), stack: new Set() };
  const isOff = (kind, numbers) => (numbers ?? "").split(" ").some((number) => off[kind].has(number));

  function show() {
    for (const part of all("[data-model], [data-stack]")) {
      part.toggleAttribute("hidden", isOff("model", part.dataset.model) || isOff("stack", part.dataset.stack));
    }
  }

  for (const box of all("input[data-switch]")) {
    box.closest("fieldset").hidden = false;
    box.hidden = false;
    box.addEventListener("change", () => {
      off[box.dataset.switch][box.checked ? "delete" : "add"](box.value);
      show();
    });
  }

  // --- figures that say their values: by pointer, touch, and the arrow keys ---

  for (const figure of all("figure")) {
    const plot = figure.querySelector(".plot");
    const keys = plot.dataset.keys.split(",");
    const places = all(".hit", plot);
    const said = new Map();
    for (const place of places) {
      const title = place.querySelector("title"); // a browser would show it besides
      said.set(place, title.textContent.split("\n"));
      title.remove();
    }
    const box = document.createElement("output");
    box.className = "say";
    box.hidden = true;
    figure.append(box);
    let now = null;

    function say(place) {
      if (now === place) return;
      now?.classList.remove("now");
      now = place;
      now?.classList.add("now");
      box.hidden = now === null;
      const lines = now === null ? [] : said.get(now).filter((_, at) => at === 0 || !isOff("model", keys[at - 1]));
      box.replaceChildren(
        ...lines.map((line) => {
          const part = document.createElement("span");
          part.textContent = line;
          return part;
        }),
      );
    }

    const shown = () => places.filter((place) => !place.hasAttribute("hidden"));
    plot.setAttribute("tabindex", "0");
    plot.addEventListener("pointermove", (event) => say(event.target.closest(".hit")));
    plot.addEventListener("pointerdown", (event) => say(event.target.closest(".hit")));
    plot.addEventListener("pointerleave", (event) => event.pointerType === "mouse" && say(null));
    plot.addEventListener("blur", () => say(null));
    plot.addEventListener("keydown", (event) => {
      const list = shown();
      const at = list.indexOf(now);
      const row = Number(plot.dataset.columns);
      const to = {
        ArrowRight: at + 1,
        ArrowLeft: at < 0 ? list.length - 1 : at - 1,
        ArrowDown: at + row,
        ArrowUp: at - row,
        Home: 0,
        End: list.length - 1,
      }[event.key];
      if (event.key === "Escape") say(null);
      else if (to === undefined || !list.length) return;
      else say(list[Math.min(Math.max(to, 0), list.length - 1)]);
      event.preventDefault();
    });
  }

  // --- light and dark ---

  const root = document.documentElement;
  const button = document.createElement("button");
  button.type = "button";
  button.id = "theme";
  const dark = () => (root.dataset.theme ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
  const name = () => (button.textContent = dark() ? "Light" : "Dark");
  button.addEventListener("click", () => {
    root.dataset.theme = dark() ? "light" : "dark";
    name();
  });
  name();
  document.querySelector("header").append(button);
})();
