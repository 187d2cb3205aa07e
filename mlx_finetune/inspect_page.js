"use strict";
const search = document.getElementById("search");
const source = document.getElementById("source");
const counter = document.getElementById("counter");
const articles = [...document.querySelectorAll("article")];
const texts = articles.map((article) => article.textContent.toLowerCase());

// Each word must be there; what stands in folded context is found too.
function apply() {
  const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
  let shown = 0;
  articles.forEach((article, i) => {
    const fits = (!source.value || article.dataset.source === source.value) && words.every((word) => texts[i].includes(word));
    article.hidden = !fits;
    shown += fits;
  });
  counter.textContent = `${shown} of ${articles.length} shown`;
}

search.addEventListener("input", apply);
source.addEventListener("change", apply);
document.getElementById("unfold").addEventListener("click", (event) => {
  const open = event.target.getAttribute("aria-pressed") !== "true";
  event.target.setAttribute("aria-pressed", open);
  document.querySelectorAll("article details").forEach((details) => { details.open = open; });
});

// page.html#8c5564f76129c723 opens with that search, so that one can be linked to.
function searchHash() {
  search.value = new URLSearchParams(`q=${location.hash.slice(1)}`).get("q");
  apply();
}

window.addEventListener("hashchange", searchHash);
searchHash();
