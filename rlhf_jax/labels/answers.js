// What a labeller can say of an item: the buttons and keys of a comparison, a rating and
// a ranking. Each returns { node, keys, press, said }: the controls, the lines of the
// help, a function that takes a key (true where it was one of its own), and one that
// tells an answer in words.

import { element } from './markdown.js';

export const LETTERS = 'ABCDEFGHIJKLMNOPQRSTUVWXYZ';
const STRENGTHS = ['slightly better', 'clearly better', 'much better', 'far better'];

/** The controls of a task; say(said) sends an answer, cards are those of completions. */
export function controls(task, plan, cards, say) {
  if (task.form === 'rating') return rating(task, plan, say);
  if (task.form === 'ranking') return ranking(task, cards, say);
  return comparison(task, plan, say);
}

export function inWords(said, form) {
  if (said.verdict === 'skipped') return 'skipped';
  if (said.verdict === 'bad') return form === 'ranking' ? 'all bad' : 'both bad';
  if (form === 'rating') return `${said.rating}`;
  if (form === 'ranking') return chain(said.ranks);
  if (said.place == null) return 'a tie';
  return `${LETTERS[said.place]} is ${STRENGTHS[said.strength - 1] ?? 'better'}`;
}

/** 'B > A = C', from ranks by place. */
function chain(ranks) {
  const order = ranks.map((rank, place) => [rank, place]);
  order.sort(([a, i], [b, j]) => a - b || i - j);
  return order.map(([rank, place], k) => {
    if (k === 0) return LETTERS[place];
    return `${order[k - 1][0] === rank ? ' = ' : ' > '}${LETTERS[place]}`;
  }).join('');
}

/** A button that names its key. */
export function button(text, key, onclick, name = '') {
  const properties = { type: 'button', class: name, onclick };
  return element('button', properties, text, element('kbd', {}, key));
}

function ordinal(rank) {
  return `${rank}${['st', 'nd', 'rd'][rank - 1] ?? 'th'}`;
}

/** A row of buttons of which one can be selected by arrow keys and said by Enter. */
function scale(options, before, say) {
  let selected = options.findIndex(({ said }) => same(said, before));
  const buttons = options.map(({ key, short, long, said, side }) => element(
    'button',
    {
      type: 'button',
      class: `option ${side ?? ''}`,
      title: long,
      'aria-label': `${long}, key ${key}`,
      onclick: () => say(said),
    },
    element('kbd', {}, key),
    element('span', {}, short),
  ));
  const draw = () => buttons.forEach((button, index) => {
    button.classList.toggle('selected', index === selected);
    button.setAttribute('aria-pressed', String(index === selected));
  });
  draw();
  const node = element('div', { class: 'scale', role: 'group' }, ...buttons);
  const press = (key) => {
    const index = options.findIndex((option) => option.key === key);
    if (index >= 0) {
      say(options[index].said);
    } else if (key === 'ArrowLeft' || key === 'ArrowRight') {
      const step = key === 'ArrowLeft' ? -1 : 1;
      const middle = (options.length - 1) / 2;
      const from = selected < 0 ? middle - step * (options.length % 2 ? 0 : 0.5) : selected;
      selected = Math.max(0, Math.min(options.length - 1, from + step));
      draw();
    } else if (key === 'Enter' && selected >= 0) {
      say(options[selected].said);
    } else {
      return false;
    }
    return true;
  };
  return { node, press };
}

function same(said, other) {
  return other != null && ['verdict', 'place', 'strength', 'rating'].every(
    (name) => (said[name] ?? null) === (other[name] ?? null),
  );
}

function comparison(task, plan, say) {
  const judged = (place, strength) => ({ verdict: 'judged', place, strength });
  const tie = { short: 'tie', long: 'Equally good', said: judged(null, null), side: 'tie' };
  let options;
  if (plan.scale === 'choice') {
    options = [
      { key: '1', short: 'A', long: 'A is better', said: judged(0, null), side: 'first' },
      { ...tie, key: '2' },
      { key: '3', short: 'B', long: 'B is better', said: judged(1, null), side: 'second' },
    ];
    options.forEach((option) => { if (option.side !== 'tie') option.short += ' is better'; });
  } else {
    options = [4, 3, 2, 1, 0, 1, 2, 3, 4].map((strength, index) => {
      const key = String(index + 1);
      if (strength === 0) return { ...tie, key };
      const place = index < 4 ? 0 : 1;
      const words = STRENGTHS[strength - 1];
      return {
        key,
        short: words.replace(' better', ''),
        long: `${LETTERS[place]} is ${words}`,
        said: judged(place, strength),
        side: `${place ? 'second' : 'first'} strength${strength}`,
      };
    });
  }
  const row = scale(options, task.before, say);
  const last = String(options.length);
  const half = (options.length - 1) / 2;
  const keys = [
    [half > 1 ? `1 … ${half}` : '1', half > 1 ? 'A is better: far … slightly' : 'A is better'],
    [`${half + 1} or t`, 'Equally good'],
    [half > 1 ? `${half + 2} … ${last}` : last,
      half > 1 ? 'B is better: slightly … far' : 'B is better'],
    ['← → then Enter', 'The same, one step after the other'],
    ['b', 'Both are bad'],
  ];
  const press = (key) => {
    if (key === 't') say(tie.said);
    else if (key === 'b') say({ verdict: 'bad' });
    else return row.press(key);
    return true;
  };
  const ends = element(
    'div',
    { class: 'ends' },
    element('span', { class: 'first' }, '◀ A is far better'),
    element('span', { class: 'second' }, 'B is far better ▶'),
  );
  const node = element('div', {}, half > 1 ? ends : null, row.node);
  return { node, keys, press, bad: 'Both bad' };
}

function rating(task, plan, say) {
  const [low, high] = plan.rating_range;
  if (low < 0 || high > 9) return slider(task, low, high, say);
  const options = [];
  for (let value = low; value <= high; value += 1) {
    const words = value === low ? 'worst' : value === high ? 'best' : '';
    options.push({
      key: String(value), short: words, long: `${value} ${words}`,
      said: { verdict: 'judged', rating: value },
    });
  }
  const keys = [[`${low} … ${high}`, 'The rating; the highest is the best'],
    ['← → then Enter', 'The same, one step after the other']];
  return { ...scale(options, task.before, say), keys };
}

function slider(task, low, high, say) {
  const start = task.before?.rating ?? Math.round((low + high) / 2);
  const value = element('output', {}, String(start));
  const range = element('input', {
    type: 'range', min: low, max: high, step: 1, value: start, 'aria-label': 'Rating',
    oninput: () => { value.textContent = range.value; },
  });
  const enter = () => say({ verdict: 'judged', rating: Number(range.value) });
  const press = (key) => {
    const moves = { ArrowLeft: -1, ArrowRight: 1, PageDown: -10, PageUp: 10 };
    if (key === 'Enter') {
      enter();
    } else if (key in moves) {
      range.value = Number(range.value) + moves[key];
      value.textContent = range.value;
    } else {
      return false;
    }
    return true;
  };
  const ends = [`${low} worst`, `${high} best`];
  const node = element('div', { class: 'slider' }, ends[0], range, ends[1], value,
    button('Rate', 'Enter', enter, 'option'));
  const keys = [['← → PageUp PageDown', 'Move the rating'], ['Enter', 'Send it']];
  return { node, press, keys };
}

function ranking(task, cards, say) {
  const count = cards.length;
  let ranked = []; // groups of places, the best first
  let joins = false; // the next one ties with the last group
  const words = element('output', { class: 'chain', 'aria-live': 'polite' });
  const clear = element('button', { type: 'button', onclick: () => back() }, 'Take back');
  const tieNext = button('Next one ties', '=', () => tie());
  const send = button('Send', 'Enter', () => done(), 'primary');
  const ranks = () => {
    const found = Array(count).fill(0);
    ranked.forEach((group, index) => group.forEach((place) => { found[place] = index + 1; }));
    return found;
  };
  const draw = () => {
    const now = ranks();
    cards.forEach((card, place) => {
      const next = ranked.length + (joins ? 0 : 1);
      const key = element('kbd', {}, String(place + 1));
      if (now[place]) card.badge.replaceChildren(ordinal(now[place]));
      else card.badge.replaceChildren(`make it ${ordinal(next)}`, key);
      card.badge.classList.toggle('selected', now[place] > 0);
    });
    const letters = (group) => group.map((place) => LETTERS[place]).join(' = ');
    const text = ranked.map(letters).join(' > ');
    words.textContent = text ? `${text}${joins ? ' = …' : ''}` : 'Press the numbers, best first';
    send.disabled = now.includes(0);
    tieNext.disabled = !ranked.length || !now.includes(0);
    clear.disabled = !ranked.length;
  };
  const pick = (place) => {
    if (place >= count || ranks()[place]) return;
    if (joins && ranked.length) ranked.at(-1).push(place);
    else ranked.push([place]);
    joins = false;
    draw();
  };
  const back = () => {
    ranked.at(-1)?.pop();
    ranked = ranked.filter((group) => group.length);
    joins = false;
    draw();
  };
  const tie = () => {
    joins = ranked.length > 0 && !joins;
    draw();
  };
  const done = () => {
    if (!ranks().includes(0)) say({ verdict: 'judged', ranks: ranks() });
  };
  task.before?.ranks?.forEach((rank, place) => {
    (ranked[rank - 1] ??= []).push(place);
  });
  cards.forEach((card, place) => card.badge.addEventListener('click', () => pick(place)));
  draw();
  const press = (key) => {
    if (/^[1-9]$/.test(key)) pick(Number(key) - 1);
    else if (key === '=' || key === 't') tie();
    else if (key === 'Backspace') back();
    else if (key === 'Enter') done();
    else if (key === 'b') say({ verdict: 'bad' });
    else return false;
    return true;
  };
  const keys = [
    [`1 … ${count}`, 'The next best response'],
    ['= or t', 'The next one is as good as the last one'],
    ['Backspace', 'Take the last one back'],
    ['Enter', 'Send the ranking'],
    ['b', 'All are bad'],
  ];
  const node = element('div', { class: 'ranker' }, words, tieNext, clear, send);
  return { node, keys, press, bad: 'All bad' };
}
