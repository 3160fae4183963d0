// Markdown to DOM nodes. Texts of models become text nodes and nothing else: there is no
// HTML, no link that can be followed and no image that is loaded. Line breaks inside a
// paragraph are kept. Nesting is bounded, and no search is repeated that has failed, so
// that no text takes long.

const DEEPEST = 6;

const FENCE = /^ {0,3}(`{3,}|~{3,})[^`]*$/;
const HEADING = /^ {0,3}(#{1,6})\s/;
const RULE = /^ {0,3}([-*_])(?:\s*\1){2,}\s*$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])(\s+|$)/;

export function element(name, properties = {}, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(properties)) {
    if (key === 'class') node.className = value;
    else if (key.startsWith('on')) node.addEventListener(key.slice(2), value);
    else if (value === true) node.setAttribute(key, '');
    else if (value !== false && value != null) node.setAttribute(key, value);
  }
  node.append(...children.filter((child) => child != null));
  return node;
}

/** The nodes of a Markdown text, in a <div class="text">. */
export function render(text) {
  const root = element('div', { class: 'text' });
  blocks(root, text.replace(/\r\n?/g, '\n').split('\n'), 0);
  return root;
}

/** The text as it is, in a <div class="text plain">. */
export function plain(text) {
  return element('div', { class: 'text plain', dir: 'auto' }, text);
}

function blocks(parent, lines, depth) {
  let i = 0;
  while (i < lines.length) {
    const line = lines[i];
    const found = FENCE.exec(line);
    if (!line.trim()) {
      i += 1;
    } else if (found) {
      i = fence(parent, lines, i, found);
    } else if (HEADING.test(line)) {
      const marks = HEADING.exec(line)[1];
      const heading = element(`h${Math.min(6, marks.length + 2)}`, { dir: 'auto' });
      inline(heading, line.trim().slice(marks.length).trim(), 0);
      parent.append(heading);
      i += 1;
    } else if (RULE.test(line)) {
      parent.append(element('hr'));
      i += 1;
    } else if (QUOTE.test(line) && depth < DEEPEST) {
      let end = i;
      while (end < lines.length && QUOTE.test(lines[end])) end += 1;
      const quote = element('blockquote');
      const inside = lines.slice(i, end).map((part) => part.replace(QUOTE, ''));
      blocks(quote, inside, depth + 1);
      parent.append(quote);
      i = end;
    } else if (ITEM.test(line) && depth < DEEPEST) {
      i = list(parent, lines, i, depth);
    } else if (line.includes('|') && cells(line).length > 1
        && cells(lines[i + 1] ?? '').every((cell) => /^:?-+:?$/.test(cell))) {
      i = table(parent, lines, i);
    } else {
      let end = i + 1;
      while (end < lines.length && !ends(lines[end], depth)) end += 1;
      const paragraph = element('p', { dir: 'auto' });
      inline(paragraph, lines.slice(i, end).join('\n').trim(), 0);
      parent.append(paragraph);
      i = end;
    }
  }
}

/** Whether a line ends the paragraph before it. */
function ends(line, depth) {
  return !line.trim() || FENCE.test(line) || HEADING.test(line) || RULE.test(line)
    || (depth < DEEPEST && (QUOTE.test(line) || ITEM.test(line)));
}

function fence(parent, lines, start, [, marks]) {
  const close = new RegExp(`^ {0,3}${marks[0]}{${marks.length},}\\s*$`);
  let end = start + 1;
  while (end < lines.length && !close.test(lines[end])) end += 1;
  const code = element('code', {}, lines.slice(start + 1, end).join('\n'));
  parent.append(element('pre', { dir: 'ltr' }, code));
  return end + 1;
}

function list(parent, lines, start, depth) {
  const [, indent, mark] = ITEM.exec(lines[start]);
  const ordered = /\d/.test(mark);
  const node = element(ordered ? 'ol' : 'ul');
  if (ordered && parseInt(mark, 10) !== 1) node.setAttribute('start', parseInt(mark, 10));
  let i = start;
  while (i < lines.length) {
    const found = ITEM.exec(lines[i]);
    if (!found || found[1].length > indent.length + 1
        || /\d/.test(found[2]) !== ordered || RULE.test(lines[i])) break;
    if (found[1].length < indent.length) break;
    const width = found[1].length + found[2].length + Math.max(1, Math.min(4, found[3].length));
    const inside = [lines[i].slice(found[0].length)];
    i += 1;
    while (i < lines.length) {
      const spaces = /^\s*/.exec(lines[i])[0].length;
      const next = lines[i + 1] ?? '';
      if (!lines[i].trim()) {
        // A blank line belongs to the item if an indented line follows it.
        if (!next.trim() || /^\s*/.exec(next)[0].length <= indent.length) break;
      } else if (spaces <= indent.length && ends(lines[i], 0)) {
        break;
      } else if (spaces <= indent.length + 1 && ITEM.test(lines[i])) {
        break;
      }
      inside.push(lines[i].slice(Math.min(spaces, width)));
      i += 1;
    }
    const item = element('li', { dir: 'auto' });
    blocks(item, inside, depth + 1);
    node.append(item);
    // A blank line between two items of the list.
    if (i + 1 < lines.length && !lines[i].trim() && ITEM.test(lines[i + 1])) i += 1;
  }
  parent.append(node);
  return i;
}

function cells(line) {
  return line.trim().replace(/^\||\|$/g, '').split('|').map((cell) => cell.trim());
}

function table(parent, lines, start) {
  const head = cells(lines[start]);
  const row = (name, texts) => {
    const node = element('tr');
    for (let k = 0; k < head.length; k += 1) {
      const cell = element(name, { dir: 'auto' });
      inline(cell, texts[k] ?? '', 0);
      node.append(cell);
    }
    return node;
  };
  const body = element('tbody');
  let i = start + 2;
  while (i < lines.length && lines[i].includes('|')) {
    body.append(row('td', cells(lines[i])));
    i += 1;
  }
  const node = element('table', {}, element('thead', {}, row('th', head)), body);
  parent.append(element('div', { class: 'wide' }, node));
  return i;
}

const EMPHASIS = [['**', 'strong'], ['__', 'strong'], ['~~', 's'], ['*', 'em'], ['_', 'em']];
const LINK = /(!?)\[([^[\]\n]{0,1000})\]\(([^()\s]{0,2000})(?:\s[^()\n]{0,300})?\)/y;

function inline(parent, text, depth) {
  const failed = new Set();
  let from = 0;
  let i = 0;
  const flush = () => {
    if (from < i) parent.append(text.slice(from, i));
  };
  const put = (node, next) => {
    flush();
    parent.append(node);
    i = next;
    from = next;
  };
  while (i < text.length) {
    const sign = text[i];
    if (sign === '\\' && /[!-/:-@[-`{-~]/.test(text[i + 1] ?? '')) {
      put(text[i + 1], i + 2);
    } else if (sign === '`') {
      const marks = /`+/y;
      marks.lastIndex = i;
      const [run] = marks.exec(text);
      const end = failed.has(run) ? -1 : closing(text, run, i + run.length);
      if (end < 0) {
        failed.add(run);
        i += run.length;
      } else {
        const code = text.slice(i + run.length, end).replace(/^ (.*\S.*) $/s, '$1');
        put(element('code', {}, code), end + run.length);
      }
    } else if ((sign === '[' || sign === '!') && link(text, i)) {
      const [whole, image, words, address] = link(text, i);
      const node = element('span', { class: 'link', title: address });
      if (image) node.append(`[image: ${words}]`);
      else inline(node, words, DEEPEST);
      if (address !== words) node.append(element('small', {}, ` (${address})`));
      put(node, i + whole.length);
    } else if ('*_~'.includes(sign) && depth < DEEPEST) {
      const [marks, name, end] = emphasis(text, i, failed);
      if (end < 0) {
        i += marks.length;
      } else {
        const node = element(name);
        const inside = text.slice(i + marks.length, end);
        put(node, end + marks.length);
        inline(node, inside, depth + 1);
      }
    } else {
      i += 1;
    }
  }
  flush();
}

function link(text, start) {
  LINK.lastIndex = start;
  return LINK.exec(text);
}

/** Where the next run of exactly these backticks stands, or -1. */
function closing(text, run, start) {
  const marks = /`+/g;
  marks.lastIndex = start;
  for (let found = marks.exec(text); found; found = marks.exec(text)) {
    if (found[0] === run) return found.index;
  }
  return -1;
}

/** The marks that open emphasis at a place, its element, and where it ends, or -1. */
function emphasis(text, start, failed) {
  const found = EMPHASIS.find(([marks]) => text.startsWith(marks, start));
  if (!found) return ['~', '', -1];
  const [marks, name] = found;
  const after = start + marks.length;
  const inWord = marks.includes('_') && /[\p{L}\p{N}]/u.test(text[start - 1] ?? '');
  if (failed.has(marks) || inWord || /^(\s|$)/.test(text.slice(after, after + 1))) {
    return [marks, name, -1];
  }
  let end = text.indexOf(marks, after + 1);
  while (end >= 0) {
    // Of three marks that close two emphases, the inner one takes the first.
    while (marks.length === 2 && text[end + 2] === marks[0]) end += 1;
    const next = text[end + marks.length] ?? '';
    const doubled = marks.length === 1 && (next === marks || text[end - 1] === marks);
    const word = marks.includes('_') && /[\p{L}\p{N}]/u.test(next);
    if (!doubled && !word && !/\s/.test(text[end - 1])) return [marks, name, end];
    end = text.indexOf(marks, end + (doubled ? 2 : 1));
  }
  failed.add(marks);
  return [marks, name, -1];
}
