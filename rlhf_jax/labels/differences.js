// Marks the words in which two rendered texts differ: those outside a longest common
// subsequence of their words.

const WORD = /[\p{Script=Han}\p{Script=Hiragana}\p{Script=Katakana}]|[\p{L}\p{N}\p{M}'’]+|\S/gu;
const LARGEST = 3e7; // cells of the table, two bytes each

/** Wraps in <mark> what second has and first has not; and the other way round if both. */
export function markDifferences(first, second, both = true) {
  const a = words(first);
  const b = words(second);
  const [keptA, keptB] = common(a.map(({ word }) => word), b.map(({ word }) => word));
  if (both) wrap(a, keptA);
  wrap(b, keptB);
}

function words(root) {
  const walker = document.createTreeWalker(root, NodeFilter.SHOW_TEXT);
  const found = [];
  while (walker.nextNode()) {
    const node = walker.currentNode;
    for (const match of node.data.matchAll(WORD)) {
      const end = match.index + match[0].length;
      found.push({ node, start: match.index, end, word: match[0] });
    }
  }
  return found;
}

/** Which words of two lists are in a longest common subsequence. */
export function common(a, b) {
  const keptA = new Uint8Array(a.length);
  const keptB = new Uint8Array(b.length);
  let head = 0;
  while (head < a.length && head < b.length && a[head] === b[head]) {
    keptA[head] = 1;
    keptB[head] = 1;
    head += 1;
  }
  let n = a.length;
  let m = b.length;
  while (n > head && m > head && a[n - 1] === b[m - 1]) {
    n -= 1;
    m -= 1;
    keptA[n] = 1;
    keptB[m] = 1;
  }
  const rows = n - head;
  const width = m - head + 1;
  if (rows * width > LARGEST) {
    // Too long to align: a word is marked where the other text lacks it altogether.
    const inA = new Set(a);
    const inB = new Set(b);
    for (let i = head; i < n; i += 1) keptA[i] = inB.has(a[i]) ? 1 : 0;
    for (let j = head; j < m; j += 1) keptB[j] = inA.has(b[j]) ? 1 : 0;
    return [keptA, keptB];
  }
  // table[i, j]: length of the longest common subsequence of a[i:] and b[j:].
  const table = new Uint16Array((rows + 1) * width);
  for (let i = rows - 1; i >= 0; i -= 1) {
    for (let j = width - 2; j >= 0; j -= 1) {
      const down = table[(i + 1) * width + j];
      const right = table[i * width + j + 1];
      table[i * width + j] = a[head + i] === b[head + j]
        ? table[(i + 1) * width + j + 1] + 1 : Math.max(down, right);
    }
  }
  for (let i = 0, j = 0; i < rows && j < width - 1;) {
    if (a[head + i] === b[head + j]) {
      keptA[head + i] = 1;
      keptB[head + j] = 1;
      i += 1;
      j += 1;
    } else if (table[(i + 1) * width + j] >= table[i * width + j + 1]) {
      i += 1;
    } else {
      j += 1;
    }
  }
  return [keptA, keptB];
}

/** Puts marks around runs of words that were not kept; from the last to the first, so
 * that the places of those before stay right. */
function wrap(found, kept) {
  let k = found.length - 1;
  while (k >= 0) {
    if (kept[k]) {
      k -= 1;
      continue;
    }
    const { node, end } = found[k];
    while (k > 0 && !kept[k - 1] && found[k - 1].node === node) k -= 1;
    const part = node.splitText(found[k].start);
    part.splitText(end - found[k].start);
    const mark = document.createElement('mark');
    part.replaceWith(mark);
    mark.append(part);
    k -= 1;
  }
}
