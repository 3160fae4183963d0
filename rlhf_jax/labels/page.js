// The page of a labeller: one item on the screen, its answer sent before the next one is
// shown, and sent again until the server has acknowledged it. An answer that was not yet
// acknowledged is kept by the browser, also when the page is closed.

import { button, controls, inWords, LETTERS } from './answers.js';
import { markDifferences } from './differences.js';
import { element, plain, render } from './markdown.js';

const at = (id) => document.getElementById(id);
const token = location.hash.slice(1);
const KEPT = `answer:${token.slice(0, 8)}`;
const GUARD = 250; // ms in which a new item takes no key that was meant for the last one
const WIDE = matchMedia('(min-width: 1000px)');

let plan = null; // what /state said once
let state = null; // what the last reply said
let item = null; // what is on the screen: { task, answer, press, … }
let sending = false;
let view = { markdown: true, differences: false };

// ------------------------------------------------------------------------------- server

class Refused extends Error {
  constructor(status, reply) {
    super(reply.error ?? `the server says ${status}`);
    this.status = status;
    this.reply = reply;
  }
}

/** The reply to a call; tried again until there is one. */
async function call(path, sent) {
  for (let wait = 500; ; wait = Math.min(8000, wait * 2)) {
    try {
      const response = await fetch(path, {
        method: sent ? 'POST' : 'GET',
        headers: { Authorization: `Bearer ${token}`, 'Content-Type': 'application/json' },
        body: sent && JSON.stringify(sent),
        cache: 'no-store',
        signal: AbortSignal.timeout(20000),
      });
      const reply = await response.json();
      if (response.status < 500) {
        notice('');
        if (!response.ok) throw new Refused(response.status, reply);
        return reply;
      }
    } catch (error) {
      if (error instanceof Refused) throw error;
    }
    notice(sent
      ? 'Your answer is not saved yet: the server does not reply. Trying again …'
      : 'The server does not reply. Trying again …');
    await new Promise((resume) => { setTimeout(resume, wait); });
  }
}

function keep(sent) {
  try {
    if (sent) localStorage.setItem(KEPT, JSON.stringify(sent));
    else localStorage.removeItem(KEPT);
  } catch { /* a browser that stores nothing: the page alone holds the answer */ }
}

function kept() {
  try {
    return JSON.parse(localStorage.getItem(KEPT));
  } catch {
    return null;
  }
}

async function change(path, sent, said) {
  if (sending) return;
  sending = true;
  document.body.classList.add('sending');
  if (path === 'answer') keep(sent);
  try {
    const reply = await call(path, sent);
    keep(null);
    state = reply;
    if (reply.feedback) showFeedback(reply.feedback, said);
    else showTask(said && `Saved: ${said}`);
  } catch (error) {
    keep(null);
    if (!(error instanceof Refused)) throw error;
    if (error.status === 403 || (error.status === 409 && !error.reply.state)) {
      showRefused(error.message);
    } else if (error.reply.state) {
      state = error.reply.state;
      showTask(`Not saved: ${error.message}`);
    } else {
      toast(`Not saved: ${error.message}`);
    }
  } finally {
    sending = false;
    document.body.classList.remove('sending');
  }
}

async function start() {
  window.addEventListener('hashchange', () => location.reload());
  document.addEventListener('keydown', onKey);
  document.addEventListener('visibilitychange', onVisible);
  if (!token) {
    showRefused('This page needs the link that you were given, with all that stands behind #.');
    return;
  }
  try {
    const unsent = kept();
    if (unsent) await change('answer', unsent);
    state = await call('state');
    plan = state;
    at('who').textContent = plan.labeller;
    document.title = `Labelling: ${plan.labeller}`;
    showTask();
  } catch (error) {
    showRefused(error.message);
  }
}

// --------------------------------------------------------------------------------- item

function showTask(message) {
  if (!plan) return; // an answer kept from before, while the page starts
  const task = state.task;
  const dimension = item?.task?.dimension;
  showProgress();
  item = { task, shown: performance.now(), before: 0, since: performance.now(), flagged: false };
  at('main').replaceChildren();
  at('footer').replaceChildren();
  at('footer').hidden = false;
  if (!task) {
    showEnd();
  } else {
    drawItem();
    drawFooter();
    showGuideline(dimension !== undefined && dimension !== task.dimension);
    if (dimension !== undefined && dimension !== task.dimension) {
      message = `From here on: ${task.dimension}. Please read its guideline.`;
    }
  }
  drawTools();
  window.scrollTo(0, 0);
  toast(message ?? '');
}

function drawItem() {
  const { task } = item;
  const main = at('main');
  const one = task.completions.length === 1;
  let question = one ? 'How good is the response?' : 'Which response is better?';
  if (task.form === 'ranking') question = 'Rank the responses, best first.';
  main.append(element(
    'h1',
    {},
    task.training ? element('span', { class: 'chip' }, 'Training') : null,
    task.dimension ? element('span', { class: 'chip' }, task.dimension) : null,
    question,
  ));
  const prompt = element('section', { class: 'prompt', 'aria-label': 'Prompt' });
  for (const [role, text] of task.prompt) {
    prompt.append(element(
      'div',
      { class: 'message' },
      role ? element('h2', {}, role) : element('h2', {}, 'Prompt'),
      body(text),
    ));
  }
  main.append(prompt);
  item.cards = task.completions.map((text, place) => {
    const badge = element('button', { type: 'button', class: 'badge' });
    const name = one ? 'Response' : `Response ${LETTERS[place]}`;
    const content = body(text);
    const ranked = task.form === 'ranking' ? badge : null;
    const head = element('header', {}, element('h2', {}, name), ranked);
    const side = task.form === 'comparison' ? ['first', 'second'][place] : '';
    const node = element('article', { class: `card ${side}`, 'aria-label': name }, head, content);
    return { node, badge, content };
  });
  const nodes = item.cards.map(({ node }) => node);
  main.append(element('div', { class: `cards ${task.form}` }, ...nodes));
  if (view.differences && !one) {
    const [first, ...others] = item.cards;
    others.forEach(({ content }) => markDifferences(first.content, content, others.length === 1));
  }
  // A long prompt does not push the responses away; p opens it.
  requestAnimationFrame(() => {
    if (prompt.scrollHeight <= prompt.clientHeight + 4) return;
    const more = button('Show the whole prompt', 'p', () => item.togglePrompt(), 'more');
    item.togglePrompt = () => {
      const open = prompt.classList.toggle('open');
      more.firstChild.data = open ? 'Shorten the prompt' : 'Show the whole prompt';
    };
    prompt.after(more);
    prompt.tabIndex = 0;
  });
}

function body(text) {
  if (!text.trim()) return element('p', { class: 'quiet' }, '(empty)');
  return view.markdown ? render(text) : plain(text);
}

/** Draws the texts anew; what was said of the item so far stays. */
function redraw() {
  if (!item?.task || item.feedback) return;
  const note = item.note?.value;
  at('main').replaceChildren();
  at('footer').replaceChildren();
  drawItem();
  drawFooter();
  if (item.flagged) flag(false, note);
  drawTools();
}

function drawFooter() {
  const { task } = item;
  const parts = controls(task, plan, item.cards, say);
  item.press = parts.press;
  item.keys = parts.keys;
  const others = element('div', { class: 'others' });
  if (parts.bad) others.append(button(parts.bad, 'b', () => say({ verdict: 'bad' })));
  others.append(button('Skip', 's', () => say({ verdict: 'skipped' })));
  item.flagButton = button('Flag', 'f', () => (item.flagged ? unflag() : flag(true)));
  others.append(item.flagButton);
  item.note = element('textarea', {
    rows: 2, maxlength: 2000, dir: 'auto', 'aria-label': 'Note',
    placeholder: 'What is wrong with this item? Enter goes back to it, Esc takes the flag away.',
    onkeydown: onNoteKey,
  });
  item.noteRow = element('div', { class: 'note', hidden: true }, item.note);
  at('footer').append(item.noteRow, parts.node, others);
}

function flag(focus, note) {
  item.flagged = true;
  item.noteRow.hidden = false;
  item.flagButton.classList.add('selected');
  if (note) item.note.value = note;
  if (focus) item.note.focus();
}

function unflag() {
  item.flagged = false;
  item.note.value = '';
  item.noteRow.hidden = true;
  item.flagButton.classList.remove('selected');
}

function onNoteKey(event) {
  if (event.key === 'Escape') unflag();
  if (event.key === 'Escape' || (event.key === 'Enter' && !event.shiftKey)) {
    event.preventDefault();
    item.note.blur();
  }
  event.stopPropagation();
}

function say(said) {
  if (sending || !item?.task || item.feedback) return;
  if (performance.now() - item.shown < GUARD) return;
  const sent = {
    id: newName(),
    key: item.task.key,
    said,
    seconds: seconds(),
    flagged: item.flagged,
    note: item.flagged ? item.note.value : '',
  };
  change('answer', sent, inWords(said, item.task.form));
}

function newName() {
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, '0')).join('');
}

/** Seconds that the item was on a visible page. */
function seconds() {
  const now = document.hidden ? 0 : performance.now() - item.since;
  return Math.round((item.before + now) / 10) / 100;
}

function onVisible() {
  if (!item) return;
  if (document.hidden) item.before += performance.now() - item.since;
  else item.since = performance.now();
}

// -------------------------------------------------------------------- around the item

function showProgress() {
  const { answered, remaining } = state;
  at('bar').value = answered + remaining ? answered / (answered + remaining) : 1;
  const rest = remaining ? `, about ${remaining} to go` : '';
  at('count').textContent = `${answered} done${rest}`;
}

function showFeedback({ right, expected, why }, said) {
  if (!plan) return; // as in showTask
  const { task } = item;
  item.feedback = true;
  item.press = (key) => {
    if (key !== 'Enter' && key !== ' ') return false;
    item.feedback = false;
    showTask();
    return true;
  };
  item.keys = [['Enter', 'Go on']];
  const title = right ? '✓ As expected' : '✗ Another answer was expected';
  at('footer').replaceChildren(element(
    'div',
    { class: `feedback ${right ? 'right' : 'wrong'}`, role: 'alert' },
    element('h2', {}, title),
    element('p', {}, `You said: ${said}. Expected: ${inWords(expected, task.form)}.`),
    why ? render(why) : null,
    button('Go on', 'Enter', () => item.press('Enter'), 'primary'),
  ));
}

function showEnd() {
  item.press = (key) => {
    if (key !== 'Enter') return false;
    location.reload();
    return true;
  };
  item.keys = [['Enter', 'Look again']];
  at('footer').hidden = true;
  at('main').append(element(
    'section',
    { class: 'end' },
    element('h1', {}, 'Nothing is left to label'),
    element('p', {}, `Thank you! You have answered ${state.answered} items.`),
    element(
      'p',
      { class: 'quiet' },
      'Items that others have begun and left come back after half an hour.',
    ),
    button('Look again', 'Enter', () => location.reload()),
  ));
}

function showRefused(message) {
  item = null;
  at('footer').hidden = true;
  at('tools').replaceChildren();
  const title = element('h1', {}, 'No items here');
  const text = element('p', {}, message);
  at('main').replaceChildren(element('section', { class: 'end' }, title, text));
}

function showGuideline(opens) {
  const text = plan.guidelines[item.task.dimension];
  const aside = at('guideline');
  if (aside.dataset.dimension !== item.task.dimension) {
    const title = item.task.dimension ? `Guideline: ${item.task.dimension}` : 'Guideline';
    const close = button('Close', 'g', toggleGuideline);
    const head = element('header', {}, element('h2', {}, title), close);
    aside.replaceChildren(element('div', {}, head, render(text)));
    aside.scrollTop = 0;
    const first = aside.dataset.dimension === undefined;
    aside.dataset.dimension = item.task.dimension;
    if (first) aside.hidden = !text || (!WIDE.matches && state.answered > 0);
  }
  if (opens && text) aside.hidden = false;
}

function toggleGuideline() {
  at('guideline').hidden = !at('guideline').hidden;
  drawTools();
}

function drawTools() {
  const tools = [];
  const tool = (text, key, onclick, on) => {
    const node = button(text, key, onclick);
    node.classList.toggle('selected', Boolean(on));
    tools.push(node);
    return node;
  };
  const undo = tool('Undo', 'u', takeBack);
  undo.disabled = !state.undo;
  if (item.task) {
    if (item.task.completions.length > 1) {
      tool('Differences', 'd', toggleDifferences, view.differences);
    }
    tool('Markdown', 'm', toggleMarkdown, view.markdown);
    if (plan.guidelines[item.task.dimension]) {
      tool('Guideline', 'g', toggleGuideline, !at('guideline').hidden);
    }
  }
  tool('Keys', '?', toggleHelp).classList.add('keys');
  at('tools').replaceChildren(...tools);
}

function toggleDifferences() {
  view = { ...view, differences: !view.differences };
  redraw();
}

function toggleMarkdown() {
  view = { ...view, markdown: !view.markdown };
  redraw();
}

function takeBack() {
  if (state?.undo && !item?.feedback) change('undo', { id: state.undo });
}

function toggleHelp() {
  const help = at('help');
  if (help.open) {
    help.close();
    return;
  }
  const keys = [
    ...(item?.keys ?? []),
    ['s', 'Skip the item'],
    ['f', 'Flag the item, with a note; then answer or skip it'],
    ['u', 'Undo the last answer and see its item again'],
    ['d', 'Mark the words in which the responses differ'],
    ['m', 'Markdown, or the text as it was written'],
    ['p', 'The whole of a long prompt'],
    ['g', 'The guideline'],
    ['Space, PageUp, ↑ ↓', 'Scroll'],
    ['?', 'This help; Esc closes it'],
  ];
  const rows = keys.map(([key, text]) => element(
    'tr',
    {},
    element('td', {}, element('kbd', {}, key)),
    element('td', {}, text),
  ));
  const close = element('button', { type: 'button', onclick: toggleHelp }, 'Close');
  help.replaceChildren(element('h2', {}, 'Keys'), element('table', {}, ...rows), close);
  help.showModal();
}

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || event.isComposing) return;
  if (event.key === '?') {
    event.preventDefault();
    toggleHelp();
    return;
  }
  if (event.repeat || at('help').open || !item) return;
  const onButton = event.target instanceof HTMLButtonElement;
  if (onButton && (event.key === 'Enter' || event.key === ' ')) return;
  const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  const others = {
    u: takeBack,
    d: toggleDifferences,
    m: toggleMarkdown,
    g: () => item.task && toggleGuideline(),
    p: () => item.togglePrompt?.(),
    s: () => say({ verdict: 'skipped' }),
    f: () => item.task && !item.feedback && flag(true),
  };
  if (item.press?.(key)) {
    event.preventDefault();
  } else if (key in others) {
    event.preventDefault();
    others[key]();
  }
}

function toast(message) {
  at('toast').textContent = message;
  at('toast').classList.remove('fades');
  if (message) requestAnimationFrame(() => at('toast').classList.add('fades'));
}

function notice(message) {
  at('notice').textContent = message;
  at('notice').hidden = !message;
}

start();
