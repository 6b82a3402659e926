// docutils calls the list of references a list and gives it no list items: a screen reader would announce an empty one.
document.addEventListener("DOMContentLoaded", () => {
  for (const list of document.querySelectorAll(".citation-list")) list.removeAttribute("role");
});
