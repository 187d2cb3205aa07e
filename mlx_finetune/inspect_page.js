"use strict";
const search = document.getElementById("search");
const source = document.getElementById("source");
const counter = document.getElementById("counter");
const unfold = document.getElementById("unfold");
const articles = [...document.querySelectorAll("article")];
const texts = articles.map((article) => article.textContent.toLowerCase());

// Each word must be there; context in which one stands unfolds.
function apply() {
  const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
  const all = unfold.getAttribute("aria-pressed") === "true";
  let shown = 0;
  articles.forEach((article, i) => {
    const fits = (!source.value || article.dataset.source === source.value) && words.every((word) => texts[i].includes(word));
    article.hidden = !fits;
    shown += fits;
    if (!fits) return;
    article.querySelectorAll("details").forEach((context) => {
      const found = words.length && words.some((word) => context.textContent.toLowerCase().includes(word));
      if (found || "found" in context.dataset) context.open = all || found;
      if (found) context.dataset.found = ""; else delete context.dataset.found;
    });
  });
  counter.textContent = `${shown} of ${articles.length} shown`;
}

let typed;
search.addEventListener("input", () => { clearTimeout(typed); typed = setTimeout(apply, 100); });
source.addEventListener("change", apply);
unfold.addEventListener("click", () => {
  const open = unfold.getAttribute("aria-pressed") !== "true";
  unfold.setAttribute("aria-pressed", open);
  document.querySelectorAll("article details").forEach((context) => { context.open = open; });
});

// page.html#8c5564f76129c723 opens with that search, so that one can be linked to.
function searchHash() {
  search.value = new URLSearchParams(`q=${location.hash.slice(1)}`).get("q");
  apply();
}

window.addEventListener("hashchange", searchHash);
searchHash();
