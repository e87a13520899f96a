"use strict";
// Filters, searches and sorts the replies; the state lives in the address's fragment, so that it can be shared.
(() => {
  const box = document.getElementById("samples");
  const form = document.getElementById("controls");
  if (!box || !form) return;
  const field = (id) => document.getElementById(id);
  const cards = [...box.querySelectorAll(".sample")].map((element) => ({
    element,
    at: Number(element.dataset.at),
    cut: element.dataset.cut === "1",
    diff: element.dataset.diff === "" ? [] : element.dataset.diff.split(" ").map(Number),
    // What was asked and answered; not the names of turns and models, which stand on every card.
    text: [...element.querySelectorAll("h3, .context p, .reply p")]
      .map((part) => part.textContent.toLowerCase())
      .join("\n"),
  }));
  const names = ["q", "pair", "show", "sort"];
  const initial = Object.fromEntries(names.filter(field).map((name) => [name, field(name).value]));

  function apply() {
    const value = (name) => (field(name) ? field(name).value : "");
    const words = value("q").toLowerCase().split(/\s+/).filter(Boolean);
    const pair = Number(value("pair") || 0);
    const diff = (card) => card.diff[pair] ?? 0;
    const shows = {
      better: (card) => diff(card) > 0,
      worse: (card) => diff(card) < 0,
      same: (card) => diff(card) === 0,
      cut: (card) => card.cut,
    };
    const orders = {
      gain: (a, b) => diff(b) - diff(a),
      loss: (a, b) => diff(a) - diff(b),
      change: (a, b) => Math.abs(diff(b)) - Math.abs(diff(a)),
    };
    const show = shows[value("show")] ?? (() => true);
    const order = orders[value("sort")] ?? (() => 0);
    let n = 0;
    for (const card of cards) {
      const match = show(card) && words.every((word) => card.text.includes(word));
      card.element.hidden = !match;
      n += match ? 1 : 0;
    }
    const sorted = [...cards].sort((a, b) => order(a, b) || a.at - b.at);
    box.append(...sorted.map((card) => card.element));
    field("count").textContent = n + " of " + cards.length + " prompts";
    field("none").hidden = n > 0;
  }

  function write() {
    const state = new URLSearchParams();
    for (const name of Object.keys(initial)) {
      if (field(name).value !== initial[name]) state.set(name, field(name).value);
    }
    const text = state.toString();
    history.replaceState(null, "", text ? "#" + text : location.pathname + location.search);
  }

  function read() {
    if (!location.hash.includes("=")) return;
    const state = new URLSearchParams(location.hash.slice(1));
    for (const name of Object.keys(initial)) {
      field(name).value = state.get(name) ?? initial[name];
      if (field(name).value === "" && name !== "q") field(name).value = initial[name];
    }
  }

  form.addEventListener("submit", (event) => event.preventDefault());
  for (const name of Object.keys(initial)) {
    field(name).addEventListener("input", () => {
      apply();
      write();
    });
  }
  field("open").addEventListener("input", () => {
    for (const turn of box.querySelectorAll(".turn")) {
      turn.open = field("open").checked || turn === turn.parentElement.querySelector(".turn");
    }
  });
  addEventListener("hashchange", () => {
    read();
    apply();
  });
  read();
  apply();
  form.classList.add("ready");
})();
