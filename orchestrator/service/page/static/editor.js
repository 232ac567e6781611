"use strict";
// The editor of a sweep file: line numbers, mistakes at their lines while one types, completion by the schema.
(() => {
  const area = document.getElementById("yaml");
  const gutter = document.querySelector(".gutter");
  const choices = document.getElementById("choices");
  const findings = document.getElementById("findings");
  const checking = document.getElementById("checking");
  const csrf = document.querySelector('meta[name="csrf"]').content;
  let wrong = new Set(area.dataset.lines.split(" ").filter(Boolean).map(Number));
  let timer = 0, isChecking = false, isStale = false, asked = 0, found = null, active = -1;

  const send = (path, body) => fetch(path, {
    method: "POST", headers: { "content-type": "application/json", "x-csrf-token": csrf }, body: JSON.stringify(body) });

  const number = () => {
    const count = area.value.split("\n").length;
    gutter.replaceChildren(...Array.from({ length: count }, (_, k) => {
      const line = document.createElement("span");
      line.textContent = `${k + 1}\n`;
      if (wrong.has(k + 1)) line.className = "wrong-line";
      return line;
    }));
    gutter.scrollTop = area.scrollTop;
  };

  const check = async () => {
    if (isChecking) { isStale = true; return; }
    isChecking = true;
    isStale = false;
    checking.hidden = false;
    try {
      const answer = await send("/new/check", { yaml: area.value });
      const content = await answer.json();
      if (answer.ok) {
        wrong = new Set(content.lines);
        findings.innerHTML = content.html;
      } else {
        findings.textContent = content.detail;
        if (answer.status === 429) isStale = true;
      }
    } catch {
      findings.textContent = "The service does not answer; it is asked again when the text changes.";
    }
    isChecking = false;
    checking.hidden = !isStale;
    number();
    document.documentElement.dataset.checked = String(Number(document.documentElement.dataset.checked ?? 0) + 1);
    if (isStale) later(2000);
  };

  const later = (milliseconds = 600) => { clearTimeout(timer); timer = setTimeout(check, milliseconds); };

  const place = () => {
    const before = area.value.slice(0, area.selectionStart);
    const line = before.split("\n").length - 1;
    return { line, column: before.length - (before.lastIndexOf("\n") + 1) };
  };

  const close = () => {
    choices.hidden = true;
    found = null;
    active = -1;
    area.removeAttribute("aria-activedescendant");
    area.removeAttribute("aria-controls");
  };

  const mark = (position) => {
    active = (position + choices.children.length) % choices.children.length;
    [...choices.children].forEach((each, k) => each.setAttribute("aria-selected", String(k === active)));
    choices.children[active].scrollIntoView({ block: "nearest" });
    area.setAttribute("aria-activedescendant", choices.children[active].id);
  };

  const open = async () => {
    const turn = ++asked, cursor = place();
    const answer = await send("/new/complete", { yaml: area.value, ...cursor });
    if (turn !== asked || !answer.ok) return;
    found = { ...(await answer.json()), ...cursor };
    const typed = area.value.slice(area.selectionStart - (cursor.column - found.begin), area.selectionStart);
    if (!found.candidates.length || (found.candidates.length === 1 && found.candidates[0].text.trim() === typed.trim())) { close(); return; }
    choices.replaceChildren(...found.candidates.map((each, k) => {
      const row = document.createElement("li"), name = document.createElement("b"), about = document.createElement("span");
      row.id = `choice-${k}`;
      row.setAttribute("role", "option");
      name.textContent = each.text;
      about.textContent = each.about;
      row.append(name, about);
      row.addEventListener("mousedown", (event) => { event.preventDefault(); accept(k); });
      return row;
    }));
    const style = getComputedStyle(area), height = parseFloat(style.lineHeight);
    const letter = document.createElement("canvas").getContext("2d");
    letter.font = `${style.fontSize} ${style.fontFamily}`;
    const top = area.offsetTop + (cursor.line + 1) * height + parseFloat(style.paddingTop) - area.scrollTop;
    const left = area.offsetLeft + found.begin * letter.measureText("m").width + parseFloat(style.paddingLeft) - area.scrollLeft;
    choices.hidden = false;
    choices.style.top = `${top + 2}px`;
    choices.style.left = `${Math.max(0, Math.min(left, area.offsetLeft + area.clientWidth - choices.offsetWidth))}px`;
    area.setAttribute("aria-controls", "choices");
    mark(0);
  };

  const accept = (position) => {
    const end = area.selectionStart, begin = end - (found.column - found.begin);
    area.setRangeText(found.candidates[position].text, begin, end, "end");
    close();
    changed();
  };

  const changed = () => { number(); later(); };

  area.setAttribute("aria-autocomplete", "list");
  area.setAttribute("aria-haspopup", "listbox");
  area.addEventListener("input", (event) => {
    changed();
    if (event.inputType === "insertText" && /[\w.]/.test(event.data ?? "")) open();
    else if (event.inputType === "deleteContentBackward" && found) open();
    else close();
  });
  area.addEventListener("keydown", (event) => {
    if (event.ctrlKey && event.code === "Space") { event.preventDefault(); open(); return; }
    if (event.key === "Enter" && choices.hidden) {
      const { line, column } = place(), text = area.value.split("\n")[line].slice(0, column);
      const indent = text.match(/^ */)[0] + (/:\s*$/.test(text) ? "  " : "");
      if (indent) { event.preventDefault(); area.setRangeText(`\n${indent}`, area.selectionStart, area.selectionEnd, "end"); changed(); }
      return;
    }
    if (choices.hidden) return;
    const move = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (move) { event.preventDefault(); mark(active + move); }
    else if (event.key === "Enter" || event.key === "Tab") { event.preventDefault(); accept(active); }
    else if (event.key === "Escape") { event.preventDefault(); close(); }
    else if (["ArrowLeft", "ArrowRight", "Home", "End"].includes(event.key)) close();
  });
  area.addEventListener("scroll", () => { gutter.scrollTop = area.scrollTop; close(); });
  area.addEventListener("blur", close);
  findings.addEventListener("click", (event) => {
    const line = Number(event.target.dataset?.line);
    if (!line) return;
    const lines = area.value.split("\n"), begin = lines.slice(0, line - 1).join("\n").length + (line > 1 ? 1 : 0);
    area.focus();
    area.setSelectionRange(begin, begin + (lines[line - 1]?.length ?? 0));
    area.scrollTop = (line - 4) * parseFloat(getComputedStyle(area).lineHeight);
  });
  document.getElementById("check").addEventListener("click", (event) => { event.preventDefault(); check(); });
  number();
  check();
})();
