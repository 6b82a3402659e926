// Puts the whole book into one page, for tools/pdf.py: every page's article, behind a title page and the contents.
// `book` holds the title, the author, the year and the pages in their order: {name, part}.
"use strict";

// What only a screen has a use for.
const SCREEN = "script, style, button, a.headerlink, #searchbox, #whole-book";

// What stands in the place of an element that works only in a browser, below its picture.
const ON_PAPER = {
  "flow-playground": "On the site, you drag points through this flow.",
  "flow-trainer": "On the site, these two flows train in the page while you watch.",
  "latent-sheet": "On the site, you explore this sheet by hand.",
};

function make(tag, className, ...children) {
  const element = document.createElement(tag);
  element.className = className;
  element.append(...children);
  return element;
}

// The address inside the PDF of a link on the page `name`; "" where the PDF does not hold the target.
function inside(address, name, names) {
  const [, path, fragment] = address.match(/^([^#]*)#?(.*)$/);
  const page = path ? path.match(/^(\w+)\.html$/)?.[1] : name;
  if (!names.has(page) || fragment.includes("=")) return "";
  return fragment ? `#${page}--${decodeURIComponent(fragment)}` : `#${page}`;
}

// A page's article as it is on paper: no controls, nothing folded, anchors and links that are unique in the book.
function prepare(article, name, names) {
  for (const element of article.querySelectorAll(SCREEN)) element.remove();
  for (const [tag, sentence] of Object.entries(ON_PAPER)) {
    for (const element of article.querySelectorAll(tag)) {
      // Besides pictures it holds what speaks to a reader without scripts.
      for (const child of [...element.children]) if (!child.matches("figure, :has(img)")) child.remove();
      element.append(make("p", "on-paper", sentence));
    }
  }
  for (const folded of article.querySelectorAll("details")) {
    const title = folded.querySelector("summary");
    const open = make("div", "folded", ...[...folded.childNodes].filter((child) => child !== title));
    if (folded.matches(".above-input")) folded.replaceWith(...open.childNodes);
    else {
      open.prepend(make("p", "folded-title", title.textContent.trim()));
      folded.replaceWith(open);
    }
  }
  for (const word of article.querySelectorAll("code span.pre")) word.replaceWith(...word.childNodes);
  for (const element of article.querySelectorAll("[id]")) element.id = `${name}--${element.id}`;
  const states = new Map(); // the last words in each paragraph that lead to a state of the playground
  for (const link of article.querySelectorAll("a[href]")) {
    const address = link.getAttribute("href");
    if (/^\w+:/.test(address)) continue;
    const target = inside(address, name, names);
    if (target) {
      link.setAttribute("href", target);
      continue;
    }
    if (/\.html#.*=/.test(address)) states.set(link.closest("p"), link.lastChild);
    link.replaceWith(...link.childNodes); // a state of the playground, or a picture by itself
  }
  for (const words of states.values()) words.after(" (on the site)");
  for (const image of article.querySelectorAll("img")) image.removeAttribute("loading");
  article.id = name;
  article.style.page = `page-${name}`;
  return article;
}

// The pieces of code between which a page may end: they end with one blank line and have at least four lines each.
function pieces(text) {
  const found = text.match(/[^]*?\n[ \t]*\n|[^]+$/g);
  const long = (piece) => piece.trim().split("\n").length >= 4;
  return found.reduce((done, piece) => {
    if (done.length && !(long(piece) && long(done.at(-1)))) done.push(done.pop() + piece);
    else done.push(piece);
    return done;
  }, []);
}

// The colours of code become highlights of plain text. Thousands of coloured words would be as many elements, which the
// browser lays out on every page and lists in the file.
function colour(main) {
  const colours = new Map(); // by class
  const highlights = new Map();
  const blocks = [...main.querySelectorAll("pre")].map((code) => {
    const ranges = [];
    let end = 0;
    const read = (node, kind) => {
      if (node.nodeType === Node.TEXT_NODE) {
        const start = end;
        end += node.length;
        if (kind) ranges.push([start, end, colours.get(kind)]);
        return;
      }
      if (node !== code && !colours.has(node.className)) colours.set(node.className, getComputedStyle(node).color);
      for (const child of node.childNodes) read(child, node === code ? "" : node.className);
    };
    read(code, "");
    return [code, ranges];
  });
  for (const [code, ranges] of blocks) {
    let start = 0;
    for (const text of pieces(code.textContent)) {
      const piece = code.cloneNode(false);
      const end = start + text.length;
      piece.append(text);
      piece.classList.toggle("part", end < code.textContent.length);
      piece.classList.toggle("long", text.split("\n").length > 30);
      const place = { startContainer: piece.firstChild, endContainer: piece.firstChild };
      for (const [from, to, colour] of ranges.filter(([from, to]) => from < end && to > start)) {
        if (!highlights.has(colour)) highlights.set(colour, new Highlight());
        const [startOffset, endOffset] = [Math.max(from, start) - start, Math.min(to, end) - start];
        highlights.get(colour).add(new StaticRange({ ...place, startOffset, endOffset }));
      }
      code.before(piece);
      start = end;
    }
    code.remove();
  }
  const style = document.createElement("style");
  for (const [i, [colour, highlight]] of [...highlights].entries()) {
    CSS.highlights.set(`code-${i}`, highlight);
    style.textContent += `::highlight(code-${i}) { color: ${colour}; }\n`;
  }
  document.head.append(style);
}

// Set a formula or a table smaller where it is wider than its place.
function fit(element) {
  const place = element.parentElement.clientWidth;
  if (place && element.scrollWidth > place + 1) element.style.fontSize = `${Math.floor((98 * place) / element.scrollWidth)}%`;
}

// Keep a number and its percent sign on one line.
function joinPercent(main) {
  const texts = document.createTreeWalker(main, NodeFilter.SHOW_TEXT);
  while (texts.nextNode()) {
    const text = texts.currentNode;
    if (/\d %/.test(text.data) && !text.parentElement.closest("pre, code, h1, h2, h3")) {
      text.data = text.data.replace(/(\d) %/g, "$1\u00a0%");
    }
  }
}

async function build(book) {
  const texts = await Promise.all(book.pages.map(({ name }) => fetch(`${name}.html`).then((answer) => answer.text())));
  const sources = texts.map((text) => new DOMParser().parseFromString(text, "text/html"));
  const names = new Set(book.pages.map(({ name }) => name));
  const articles = sources.map((source, i) => prepare(source.querySelector("article.bd-article"), book.pages[i].name, names));

  const cover = articles[0].querySelector("figure");
  const titlePage = make("section", "title-page",
    make("p", "book-title", book.title), make("p", "book-author", `${book.author}, ${book.year}`), cover,
    make("p", "book-licence", book.licence));
  const contents = make("section", "contents", make("h1", "", "Contents"));
  const line = (target, text, kind) => {
    const link = make("a", kind, text);
    link.href = `#${target}`;
    contents.append(link);
  };
  const titles = articles.map((article) => article.querySelector("h1").textContent.trim());
  for (const [i, { name, part }] of book.pages.entries()) {
    if (part) contents.append(make("p", "part", part));
    line(name, titles[i], "page-line");
    for (const heading of articles[i].querySelectorAll("h2")) line(heading.parentElement.id, heading.textContent.trim(), "section-line");
  }
  const header = document.createElement("style");
  header.textContent = titles
    .map((title, i) => `@page page-${book.pages[i].name} { @top-center { content: ${JSON.stringify(title)}; } }`)
    .join("\n");
  document.head.append(header);
  const main = make("main", "", titlePage, contents, ...articles);
  document.adoptNode(main); // now its pictures load
  await Promise.all([...main.querySelectorAll("img")].map((image) => image.decode()));
  document.body.append(main);
  colour(main);
  joinPercent(main);
  await MathJax.startup.promise;
  await MathJax.typesetPromise();
  await document.fonts.ready;
  for (const wide of main.querySelectorAll("mjx-container, table")) fit(wide);
  // One or two lines below a heading do not end a page.
  for (const text of main.querySelectorAll(":is(h1, h2, h3) + p")) text.classList.toggle("brief", text.clientHeight < 50);
}

// Write the pages into the contents; the numbers come from a first print.
function number(places) {
  for (const link of document.querySelectorAll(".contents a")) {
    link.dataset.page = places[decodeURIComponent(link.hash.slice(1))];
  }
}
