"""Make the generated documents of `calibration.txt`, and put them in their places.

The calibration text has two sorts of documents. Those written by hand live in `calibration.txt`
itself and nowhere else. Those that are structured (logs, tables, records, arithmetic) are made by
this program. Every fourth document of the file is a generated one, so the program can take the
others from the file, make its own anew, and join them: `--check` demands that the result is the
file, byte for byte.

    python make_calibration.py            write calibration.txt again
    python make_calibration.py --check    say whether it would change (exit status 1 if so)

All numbers in the generated documents are computed, never invented: sums, products and dates are
right. The file is long because the vocabularies and the templates are in it.
"""

from __future__ import annotations

import argparse
import difflib
import hashlib
import json
import math
import sys
from collections.abc import Callable, Sequence
from datetime import date, datetime, timedelta
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")
Document = tuple[str, str]  # kind, text
Field = tuple[str, str]  # name, one of str int float bool

MARK = "%%% "
EVERY = 4  # documents 3, 7, 11, ... are generated


class Dice:
    """Random choices that are the same on every machine and version (splitmix64)."""

    def __init__(self, name: str) -> None:
        self._state = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")

    def below(self, n: int) -> int:
        """An integer from 0 to n - 1."""
        self._state = (self._state + 0x9E3779B97F4A7C15) % 2**64
        z = self._state
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        return ((z ^ (z >> 31)) >> 11) * n >> 53

    def between(self, low: int, high: int) -> int:
        """An integer from low to high, both included."""
        return low + self.below(high - low + 1)

    def pick(self, items: Sequence[T]) -> T:
        """One of the items."""
        return items[self.below(len(items))]

    def some(self, items: Sequence[T], k: int) -> list[T]:
        """k different items in random order."""
        rest = list(items)
        return [rest.pop(self.below(len(rest))) for _ in range(k)]


NAMES = (  # noqa: SIM905
    "Amara Nwosu|Ben Castellan|Chloe Dufresne|Dmitri Orlov|Elif Kaya|Farid Haddad|"
    "Greta Holm|Hana Kimura|Ivo Brandt|Jun Park|Katya Lesnik|Leo Marchetti|Mina Rahimi|"
    "Nils Aaltonen|Oona Byrne|Pavel Novak|Qadir Shah|Rosa Villanueva|Sam Whitlock|"
    "Tess Okonjo|Ulla Berg|Victor Ionescu|Wanda Piotrowska|Xiu Chen|Yara Cohen|Zeno Baker"
).split("|")
TOWNS = (  # noqa: SIM905
    "Aalborg|Bergamo|Coimbra|Dijon|Esbjerg|Fukuoka|Ghent|Haifa|Izmir|Jaipur|Kaunas|"
    "Leeds|Malmo|Nantes|Ostrava|Perth|Quito|Rostock|Salta|Turku|Utrecht|Vigo|"
    "Wellington|Yerevan|Zadar"
).split("|")
GOODS = (  # noqa: SIM905
    "copper wire|oak board|linen cloth|roof tile|bicycle bell|paper lantern|garden hose|"
    "desk lamp|wool blanket|kitchen scale|tea kettle|hand saw|picture frame|door hinge|"
    "rain barrel|seed tray|chess set|violin string|map of the city|leather strap|"
    "glass jar|steel bolt"
).split("|")
DOMAINS: dict[str, tuple[Field, ...]] = {
    "shipment": (
        ("tracking_code", "str"),
        ("parcels", "int"),
        ("weight_kg", "float"),
        ("insured", "bool"),
    ),
    "sensor": (("serial", "str"), ("interval_s", "int"), ("offset", "float"), ("outdoor", "bool")),
    "booking": (("guest", "str"), ("nights", "int"), ("deposit", "float"), ("breakfast", "bool")),
    "vessel": (("call_sign", "str"), ("crew", "int"), ("draught_m", "float"), ("anchored", "bool")),
    "seedling": (("species", "str"), ("pots", "int"), ("height_cm", "float"), ("hardy", "bool")),
    "loan": (("borrower", "str"), ("months", "int"), ("rate", "float"), ("fixed", "bool")),
    "track": (("title", "str"), ("plays", "int"), ("loudness_db", "float"), ("live", "bool")),
    "turbine": (("site", "str"), ("blades", "int"), ("power_mw", "float"), ("offshore", "bool")),
    "patient_bed": (("ward", "str"), ("room", "int"), ("length_m", "float"), ("occupied", "bool")),
    "parcel_locker": (("street", "str"), ("doors", "int"), ("depth_m", "float"), ("lit", "bool")),
    "recipe_step": (("action", "str"), ("minutes", "int"), ("celsius", "float"), ("lid", "bool")),
    "game_piece": (("symbol", "str"), ("value", "int"), ("mobility", "float"), ("royal", "bool")),
}
NOUNS = (  # noqa: SIM905
    "anchor basket candle dragon engine feather garden hammer island jacket kettle ladder "
    "mirror needle orchard pepper quarry ribbon saddle tunnel umbrella valley window zipper"
).split()


def camel(name: str) -> str:
    return "".join(part.capitalize() for part in name.split("_"))


def example(d: Dice, field: Field) -> object:
    """A value of the type of a field."""
    name, kind = field
    if kind == "str":
        if name in ("guest", "borrower"):
            return d.pick(NAMES)
        if name in ("site", "street", "ward"):
            return d.pick(TOWNS) + d.pick((" North", " South", " Harbour", " Old Town", ""))
        return f"{d.pick(NOUNS)}-{d.between(10, 99)}"
    if kind == "int":
        return d.between(1, 60)
    return d.between(1, 4999) / 100 if kind == "float" else d.below(2) == 1


def plain(value: object) -> str:
    """A value as it stands in a line of data: no quotes, truth values in lower case."""
    return value if isinstance(value, str) else json.dumps(value)


# ---- code ------------------------------------------------------------------------------------
def python_record(d: Dice, domain: str) -> str:
    fields, cls = DOMAINS[domain], camel(domain)
    text, count, amount, flag = (name for name, _ in fields)
    values = [example(d, f) for f in fields]
    return f'''"""A {domain.replace("_", " ")} and how two lists of them are merged."""
from dataclasses import asdict, dataclass, replace


@dataclass(frozen=True, slots=True)
class {cls}:
    {text}: str
    {count}: int = {d.between(1, 9)}
    {amount}: float = 0.0
    {flag}: bool = False

    def __post_init__(self) -> None:
        if not self.{text}.strip():
            raise ValueError("{text} must not be empty")
        if self.{count} < 0:
            raise ValueError(f"{count} must be positive, got {{self.{count}}}")


def merge_{domain}s(old: list[{cls}], new: list[{cls}]) -> list[{cls}]:
    """Entries of `new` win; the order of `old` is kept and unknown ones are appended."""
    by_{text} = {{item.{text}: item for item in old}}
    for item in new:
        known = by_{text}.get(item.{text})
        by_{text}[item.{text}] = item if known is None else replace(
            known, {count}=known.{count} + item.{count}, {flag}=item.{flag}
        )
    return list(by_{text}.values())


def test_merge_adds_{count}() -> None:
    first = {cls}({values[0]!r}, {values[1]!r}, {values[2]!r}, {values[3]!r})
    merged = merge_{domain}s([first], [{cls}({values[0]!r}, {count}=5)])
    assert [m.{count} for m in merged] == [{int(str(values[1])) + 5}]
    assert asdict(merged[0])["{amount}"] == {values[2]!r}
'''


def typescript_store(d: Dice, domain: str) -> str:
    fields, cls = DOMAINS[domain], camel(domain)
    ts = {"str": "string", "int": "number", "float": "number", "bool": "boolean"}
    lines = [f"  {name}: {ts[kind]};" for name, kind in fields]
    checks = " &&\n    ".join(f'typeof v.{name} === "{ts[kind]}"' for name, kind in fields)
    key, count = fields[0][0], fields[1][0]
    return f"""export interface {cls} {{
{chr(10).join(lines)}
}}

export function is{cls}(value: unknown): value is {cls} {{
  if (typeof value !== "object" || value === null) return false;
  const v = value as Record<string, unknown>;
  return (
    {checks}
  );
}}

export class {cls}Store {{
  #items = new Map<string, {cls}>();
  #listeners = new Set<(item: {cls}) => void>();

  put(item: {cls}): void {{
    this.#items.set(item.{key}, Object.freeze({{ ...item }}));
    for (const listen of this.#listeners) listen(item);
  }}

  onChange(listen: (item: {cls}) => void): () => void {{
    this.#listeners.add(listen);
    return () => this.#listeners.delete(listen);
  }}

  total{camel(count)}(): number {{
    return [...this.#items.values()].reduce((sum, item) => sum + item.{count}, 0);
  }}
}}

const raw: unknown = JSON.parse(await (await fetch("/{domain}s/{d.between(100, 999)}")).text());
if (!is{cls}(raw)) throw new TypeError("the server sent no {domain.replace("_", " ")}");
"""


def rust_parser(d: Dice, domain: str) -> str:
    fields, cls = DOMAINS[domain], camel(domain)
    rs = {"str": "String", "int": "u32", "float": "f64", "bool": "bool"}
    decl = "\n".join(f"    pub {name}: {rs[kind]}," for name, kind in fields)
    turn = {kind: f".parse::<{rs[kind]}>()?" for kind in rs} | {"str": ".to_owned()"}
    parse = "\n".join(f'            {n}: column("{n}")?{turn[k]},' for n, k in fields)
    row = ";".join(plain(example(d, f)) for f in fields)
    return f'''#[derive(Debug, Clone, PartialEq)]
pub struct {cls} {{
{decl}
}}

impl {cls} {{
    /// Reads one line of the form `{";".join(name for name, _ in fields)}`.
    pub fn from_line(line: &str) -> Result<Self, Box<dyn std::error::Error>> {{
        let mut parts = line.trim_end().split(';');
        let mut column =
            |name: &str| parts.next().ok_or_else(|| format!("missing column {{name}}"));
        Ok({cls} {{
{parse}
        }})
    }}
}}

fn main() -> Result<(), Box<dyn std::error::Error>> {{
    let {domain} = {cls}::from_line("{row}")?;
    println!("{{{domain}:#?}}");
    Ok(())
}}
'''


def go_handler(d: Dice, domain: str) -> str:
    fields, cls = DOMAINS[domain], camel(domain)
    go = {"str": "string", "int": "int", "float": "float64", "bool": "bool"}
    width = max(len(camel(n)) for n, _ in fields)
    decl = "\n".join(f'\t{camel(n):<{width}} {go[k]:<7} `json:"{n}"`' for n, k in fields)
    key, count = camel(fields[0][0]), camel(fields[1][0])
    return f"""package {domain.replace("_", "")}

type {cls} struct {{
{decl}
}}

func (s *Server) handle{cls}(w http.ResponseWriter, r *http.Request) {{
	switch r.Method {{
	case http.MethodGet:
		item, ok := s.{domain.replace("_", "")}s.Load(r.PathValue("id"))
		if !ok {{
			http.Error(w, "no such {domain.replace("_", " ")}", http.StatusNotFound)
			return
		}}
		writeJSON(w, http.StatusOK, item)
	case http.MethodPut:
		var in {cls}
		dec := json.NewDecoder(http.MaxBytesReader(w, r.Body, {d.pick((1, 4, 16, 64))}<<10))
		dec.DisallowUnknownFields()
		if err := dec.Decode(&in); err != nil {{
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}}
		if in.{key} == "" || in.{count} < 0 {{
			http.Error(w, "need {fields[0][0]}, {fields[1][0]}", http.StatusUnprocessableEntity)
			return
		}}
		s.{domain.replace("_", "")}s.Store(r.PathValue("id"), in)
		w.WriteHeader(http.StatusNoContent)
	default:
		w.Header().Set("Allow", "GET, PUT")
		http.Error(w, "method not allowed", http.StatusMethodNotAllowed)
	}}
}}
"""


def sql_table(d: Dice, domain: str) -> str:
    fields = DOMAINS[domain]
    sql = {"str": "text", "int": "integer", "float": "numeric(10, 2)", "bool": "boolean"}
    decl = ",\n".join(f"    {name:<14} {sql[kind]} NOT NULL" for name, kind in fields)
    rows = []
    for _ in range(9):
        values = [example(d, f) for f in fields]
        shown = [f"'{v}'" if isinstance(v, str) else str(v).lower() for v in values]
        rows.append(f"    ({', '.join(shown)}, '{d.pick(TOWNS)}')")
    text, count, amount, flag = (name for name, _ in fields)
    values_sql = ",\n".join(rows)
    return f"""CREATE TABLE {domain} (
    id             serial PRIMARY KEY,
{decl},
    town           text NOT NULL
);
INSERT INTO {domain} ({text}, {count}, {amount}, {flag}, town) VALUES
{values_sql};

SELECT town, count(*) AS n, sum({count}) AS {count}, round(avg({amount}), 2) AS mean_{amount}
FROM {domain}
WHERE {flag} OR {count} > {d.between(5, 40)}
GROUP BY town
HAVING count(*) >= 1
ORDER BY {count} DESC, town;

UPDATE {domain} AS x
SET {amount} = x.{amount} * 1.{d.between(11, 49)}
WHERE NOT EXISTS (SELECT 1 FROM {domain} AS y WHERE y.town = x.town AND y.id < x.id);
"""


def css_form(d: Dice, domain: str) -> str:
    kinds = {
        "str": 'type="text" required',
        "int": 'type="number" min="0" step="1"',
        "float": 'type="number" step="0.01"',
        "bool": 'type="checkbox"',
    }
    rows = "\n".join(
        f'  <label for="{n}">{n.replace("_", " ").capitalize()}</label>'
        f'\n  <input id="{n}" name="{n}" {kinds[k]}>'
        for n, k in DOMAINS[domain]
    )
    hue = d.between(0, 359)
    return f""".{domain}-form {{
  display: grid;
  grid-template-columns: minmax({d.between(6, 12)}rem, 1fr) 2fr;
  gap: .{d.between(4, 9)}rem 1rem;
  padding: {d.between(1, 3)}rem;
  border: 1px solid hsl({hue} 30% 70%);
  background: hsl({hue} 40% 97%);
}}
.{domain}-form input:invalid {{ outline: 2px solid hsl({(hue + 180) % 360} 70% 45%); }}
@media (max-width: {d.between(30, 44)}em) {{
  .{domain}-form {{ grid-template-columns: 1fr; }}
}}

<form class="{domain}-form" method="post" action="/{domain}s">
{rows}
  <button type="submit">Save {domain.replace("_", " ")}</button>
</form>
"""


def c_record(d: Dice, domain: str) -> str:
    text, count, amount, flag = (name for name, _ in DOMAINS[domain])
    size = d.pick((16, 24, 32, 48))
    return f"""#define {domain.upper()}_NAME {size}

struct {domain} {{
    char   {text}[{domain.upper()}_NAME];
    long   {count};
    double {amount};
    bool   {flag};
}};

/* Returns 0, or the number of the field that could not be read. */
int {domain}_read(struct {domain} *out, const char *line)
{{
    const char *p = strchr(line, ',');
    char *end;
    if (p == NULL || p == line || p - line >= {domain.upper()}_NAME)
        return 1;
    memcpy(out->{text}, line, (size_t)(p - line));
    out->{text}[p - line] = '\\0';
    errno = 0;
    out->{count} = strtol(p + 1, &end, 10);
    if (errno != 0 || *end != ',')
        return 2;
    out->{amount} = strtod(end + 1, &end);
    if (*end != ',' || !isfinite(out->{amount}))
        return 3;
    out->{flag} = end[1] == 'y';
    return end[1] == 'y' || end[1] == 'n' ? 0 : 4;
}}

static int by_{count}(const void *a, const void *b)
{{
    const struct {domain} *x = a, *y = b;
    return (x->{count} > y->{count}) - (x->{count} < y->{count});
}}
"""


def patch(d: Dice, domain: str) -> str:
    old = python_record(Dice(f"patch {domain}"), domain).splitlines()
    text, count, amount, _ = (name for name, _ in DOMAINS[domain])
    new = [line.replace("frozen=True, slots=True", "frozen=True, kw_only=True") for line in old]
    at = next(i for i, line in enumerate(new) if line.startswith(f"    {amount}:"))
    new[at] = f"    {amount}: float = {d.between(1, 99) / 10}"
    new[at + 2 : at + 2] = [
        "",
        "    @property",
        f"    def {amount}_per_{count}(self) -> float:",
        f"        return self.{amount} / max(1, self.{count})",
    ]
    name = f"src/{domain}.py"
    diff = difflib.unified_diff(old, new, f"a/{name}", f"b/{name}", lineterm="", n=3)
    title = f"{domain}: {amount} for each of the {count}, by {text}"
    return f"commit {hashlib.sha1(name.encode()).hexdigest()}\n\n    {title}\n\n" + "\n".join(diff)


def access_log(d: Dice, _: str) -> str:
    when = datetime(2021, d.between(1, 12), d.between(1, 28), d.between(0, 23), d.between(0, 59))
    agents = (
        "Mozilla/5.0 (X11; Linux x86_64; rv:109.0) Gecko/20100101 Firefox/118.0",
        "curl/7.88.1",
        "feedreader 3.2",
        "-",
    )
    lines = []
    for _i in range(14):
        when += timedelta(seconds=d.between(0, 40))
        path = f"/{d.pick(NOUNS)}/{d.pick(NOUNS)}{d.pick(('', '.css', '.png', '?page=2', '/edit'))}"
        status = d.pick((200, 200, 200, 204, 301, 304, 403, 404, 500))
        lines.append(
            f"192.0.2.{d.between(1, 254)} - - [{when:%d/%b/%Y:%H:%M:%S} +0000] "
            f'"{d.pick(("GET", "GET", "GET", "POST", "HEAD"))} {path} HTTP/1.1" {status} '
            f'{d.between(0, 48211)} "-" "{d.pick(agents)}"'
        )
    return "\n".join(lines)


def service_log(d: Dice, _: str) -> str:
    when = datetime(2022, d.between(1, 12), d.between(1, 28), d.between(0, 23), 0, 0)
    say: tuple[Callable[[], str], ...] = (
        lambda: f"INFO  scheduler  job {d.pick(NOUNS)}-{d.below(900)} took {d.below(90000)} ms",
        lambda: f"DEBUG cache      hit={d.below(9999)} miss={d.below(400)} evicted={d.below(60)}",
        lambda: f"WARN  db.pool    {d.between(12, 19)}/20 in use, waited {d.below(900)} ms",
        lambda: f"ERROR mailer     550 mailbox {d.pick(NOUNS)}@example.com unavailable, giving up",
        lambda: f"INFO  http       PUT /v1/{d.pick(NOUNS)}s/{d.below(9999)} 200 {d.below(300)} ms",
        lambda: f"WARN  disk       /var/lib/{d.pick(NOUNS)} is {d.between(81, 97)} % full",
        lambda: f"INFO  auth       {d.pick(NAMES).split()[0].lower()} came from {d.pick(TOWNS)}",
        lambda: f"DEBUG queue      depth {d.below(500)}, oldest message {d.below(120)} s",
    )
    lines = []
    for _i in range(22):
        when += timedelta(milliseconds=d.between(3, 9000))
        lines.append(f"{when.isoformat(timespec='milliseconds')}Z {d.pick(say)()}")
    return "\n".join(lines)


def shell_session(d: Dice, _: str) -> str:
    user, host = d.pick(NAMES).split()[0].lower(), d.pick(NOUNS)
    sizes = sorted((d.between(200, 9_000_000) for _ in range(6)), reverse=True)
    files = d.some(NOUNS, 6)
    prompt = f"{user}@{host}:~/data$ "
    out = [prompt + "ls -lS", f"total {sum(math.ceil(s / 4096) * 4 for s in sizes)}"]
    for size, name in zip(sizes, files, strict=True):
        stamp = f"{d.pick(('Jan', 'Apr', 'Jul', 'Oct'))} {d.between(1, 28):>2} "
        stamp += f"0{d.between(0, 9)}:{d.between(10, 59)}"
        out.append(f"-rw-r--r-- 1 {user} staff {size:>8} {stamp} {name}.csv")
    total = 0
    out.append(prompt + "wc -l *.csv | sort -n")
    for lines, name in sorted((d.between(3, 90000), f) for f in files):
        out.append(f"{lines:>8} {name}.csv")
        total += lines
    count = f"'$3 > {d.between(10, 99)} {{ n++ }} END {{ print n }}' {files[1]}.csv"
    out += [
        f"{total:>8} total",
        prompt + f"grep -c '^{d.between(2010, 2023)}' {files[0]}.csv",
        str(d.between(1, 800)),
        prompt + f"awk -F, {count}",
        str(d.between(1, 90)),
        prompt + f"rm {files[2]}.cvs",
        f"rm: cannot remove '{files[2]}.cvs': No such file or directory",
        prompt + "exit",
    ]
    return "\n".join(out)


def json_records(d: Dice, domain: str) -> str:
    items = []
    for i in range(6):
        item: dict[str, object] = {"id": 1000 + 7 * i + d.below(7)}
        item |= {f[0]: example(d, f) for f in DOMAINS[domain]}
        item["owner"] = {"name": d.pick(NAMES), "town": d.pick(TOWNS)}
        item["tags"] = d.some(NOUNS, d.between(0, 3))
        items.append(item)
    return json.dumps({f"{domain}s": items, "next": None, "count": len(items)}, indent=2)


def yaml_services(d: Dice, domain: str) -> str:
    out = ["services:"]
    for name in d.some(NOUNS, 4):
        port = d.between(3000, 9000)
        version = f"{d.between(0, 4)}.{d.between(0, 20)}"
        limits = f'cpus: "{d.between(1, 8) / 4}", memory: {d.between(1, 16) * 128}M'
        out += [
            f"  {name}:",
            f"    image: registry.example.com/{domain}/{name}:{version}",
            f"    restart: {d.pick(('always', 'unless-stopped', 'on-failure'))}",
            "    environment:",
            f"      {name.upper()}_URL: http://{name}.internal:{port}",
            f"      LOG_LEVEL: {d.pick(('debug', 'info', 'warning'))}",
            f'    ports: ["{port}:{port}"]',
            f"    deploy: {{ resources: {{ limits: {{ {limits} }} }} }}",
        ]
    return "\n".join([*out, "volumes:", f"  {domain}-data: {{}}"])


# ---- dialogue --------------------------------------------------------------------------------
def chat(*turns: str) -> str:
    """Turns, the user's first."""
    return "\n".join(f"{('User', 'Assistant')[i % 2]}: {turn}" for i, turn in enumerate(turns))


def products(d: Dice, _: str) -> str:
    turns = []
    ask = d.some(
        (
            "What is {} × {}?",
            "and {} times {}",
            "{}*{} please, with the steps",
            "multiply {} by {}",
        ),
        4,
    )
    for form in ask:
        a, b = d.between(113, 989), d.between(12, 98)
        tens, ones = b // 10 * 10, b % 10
        if ones == 0:
            step = f"{a} × {b // 10} = {a * (b // 10)}, and with the zero: {a * b}."
        else:
            step = (
                f"{a} × {tens} = {a * tens}\n{a} × {ones} = {a * ones}\n"
                f"{a * tens} + {a * ones} = **{a * b}**"
            )
        turns += [form.format(a, b), step]
    return chat(*turns)


def discounts(d: Dice, _: str) -> str:
    turns = []
    for form in d.some(
        (
            "A {g} costs {p} euros. It's reduced by {r} %. What do I pay?",
            "I bought a {g} for {p} € and got {r} percent off. New price?",
            "price of {g} was {p}, now -{r}%, how much is that",
        ),
        3,
    ):
        cents, rate = d.between(8, 180) * 100, d.pick((5, 10, 15, 20, 25, 30, 35, 40))
        off = cents * rate // 100
        left = f"{(cents - off) / 100:.2f}"
        turns += [
            form.format(g=d.pick(GOODS), p=f"{cents / 100:.2f}", r=rate),
            f"{rate} % of {cents / 100:.2f} is {off / 100:.2f}.\n"
            f"{cents / 100:.2f} − {off / 100:.2f} = **{left} euros**.\n"
            f"Or in one step: {cents / 100:.2f} × {1 - rate / 100:.2f} = {left}.",
        ]
    return chat(*turns)


def dates(d: Dice, _: str) -> str:
    turns = []
    for _i in range(3):
        start = date(d.between(1960, 2030), d.between(1, 12), d.between(1, 28))
        days = d.between(20, 700)
        end = start + timedelta(days=days)
        leap = "a leap year" if start.year % 4 == 0 else "not a leap year"
        turns += [
            d.pick(
                (
                    "Which date is {n} days after {s}?",
                    "{s} plus {n} days?",
                    "add {n} days to {s} and tell me the weekday",
                )
            ).format(n=days, s=start),
            f"{start:%d %B %Y} was a {start:%A}; {start.year} is {leap}. {days} days are "
            f"{days // 7} weeks and {days % 7} days, so we land on a {end:%A}: "
            f"{end:%d %B %Y} ({end}).",
        ]
    return chat(*turns)


def minus(n: int) -> str:
    """The number with a true minus sign."""
    return f"−{-n}" if n < 0 else str(n)


def factor(n: int) -> str:
    """The same, in brackets where it is negative: fit to follow a sign."""
    return f"({minus(n)})" if n < 0 else str(n)


def equations(d: Dice, _: str) -> str:
    turns = []
    for form in d.some(
        (
            "Solve the system {0} and {1}.",
            "Find x and y: {0}; {1}",
            "two equations, two unknowns: {0}, {1}",
        ),
        3,
    ):
        x, y = d.between(-6, 9), d.between(-6, 9)
        a, b, c = d.between(2, 5), d.between(2, 7), d.between(2, 6)
        right, lower = a * x + b * y, c * x - y
        slope = f"{c}x {'−' if lower >= 0 else '+'} {abs(lower)}"
        k, rhs = a + b * c, right + b * lower  # put in: kx = rhs
        turns += [
            form.format(f"{a}x + {b}y = {right}", f"{c}x - y = {lower}"),
            f"From the second equation y = {slope}. Put that into the first:\n"
            f"{a}x + {b}({slope}) = {minus(right)}\n"
            f"{k}x = {minus(right)} + {b} · {factor(lower)} = {minus(rhs)}\n"
            f"x = {minus(rhs)} / {k} = {minus(x)}, and "
            f"y = {c} · {factor(x)} − {factor(lower)} = {minus(y)}.\n"
            f"**x = {minus(x)}, y = {minus(y)}**",
        ]
    return chat(*turns)


def factors(d: Dice, _: str) -> str:
    def powers(n: int) -> str:
        found: dict[int, int] = {}
        p = 2
        while n > 1:
            while n % p == 0:
                found[p] = found.get(p, 0) + 1
                n //= p
            p += 1
        return " × ".join(f"{p}^{e}" if e > 1 else str(p) for p, e in found.items())

    a, b = d.between(40, 400) * 6, d.between(40, 400) * 10
    g = math.gcd(a, b)
    rows, p, q = [], max(a, b), min(a, b)
    while q:
        rows.append(f"{p} = {p // q} × {q} + {p % q}")
        p, q = q, p % q
    return chat(
        f"Prime factors of {a} and {b}?",
        f"{a} = {powers(a)}\n{b} = {powers(b)}",
        "their greatest common divisor by Euclid",
        "\n".join(rows) + f"\nThe last remainder that isn't zero is {g}, so gcd({a}, {b}) = {g}.",
        "and lcm",
        f"lcm = {a} × {b} / {g} = {a * b // g}.",
    )


def word_lists(d: Dice, _: str) -> str:
    words = d.some(NOUNS, 9)
    letter = d.pick("aelnr")
    numbers = [d.between(-90, 300) for _ in range(11)]
    middle = sorted(numbers)[5]
    hits = [f"{w} ({w.count(letter)})" for w in words if letter in w]
    return chat(
        f"Sort alphabetically: {', '.join(words)}",
        ", ".join(sorted(words)),
        "reverse order, in capitals, one per line",
        "\n".join(w.upper() for w in sorted(words, reverse=True)),
        f"which of them contain the letter {letter} and how often",
        ", ".join(hits) if hits else "None of them.",
        f"ok numbers now. sort {' '.join(map(str, numbers))} and give min max median sum",
        f"Sorted: {', '.join(map(str, sorted(numbers)))}\nMinimum {min(numbers)}, maximum "
        f"{max(numbers)}, median {middle} (the sixth of eleven), sum {sum(numbers)}.",
    )


def to_json(d: Dice, domain: str) -> str:
    fields = DOMAINS[domain]
    rows = [{f[0]: example(d, f) for f in fields} for _ in range(4)]
    head = ",".join(name for name, _ in fields)
    lines = [",".join(map(plain, row.values())) for row in rows]
    count = fields[1][0]
    counts = [int(str(row[count])) for row in rows]
    top = rows[counts.index(max(counts))]
    return chat(
        f"Here are four {domain}s as CSV. Make JSON of them, numbers as numbers.\n\n```csv\n"
        + "\n".join([head, *lines])
        + "\n```",
        "```json\n[\n" + ",\n".join(f"  {json.dumps(row)}" for row in rows) + "\n]\n```",
        f"Only the entry with the largest {count}, as YAML",
        "```yaml\n" + "\n".join(f"{k}: {json.dumps(v)}" for k, v in top.items()) + "\n```",
        f"sum of {count}?",
        f"{' + '.join(map(str, counts))} = {sum(counts)}",
    )


def tool_calls(d: Dice, _: str) -> str:
    town, other = d.some(TOWNS, 2)
    t, wind, u = d.between(-4, 31), d.between(2, 60), d.between(-4, 31)
    than = f"{abs(t - u)} degrees {'warmer' if t > u else 'colder'} than"
    sky = d.pick(("clear", "overcast", "light rain"))
    extra = d.pick(("convert_currency(amount, source, target)", "send_note(text, to)"))
    return chat(
        'You may call a tool by answering with {"name": ..., "arguments": {...}} only. '
        f"Tools: get_weather(town, units), {extra}. Now: what's the weather like in {town}?",
        json.dumps({"name": "get_weather", "arguments": {"town": town, "units": "metric"}}),
        f"Tool result: {json.dumps({'celsius': t, 'wind_kmh': wind, 'sky': sky})}",
        f"It is {t} °C in {town} at the moment, with a wind of {wind} km/h and a sky that is {sky}."
        if sky != "light rain"
        else f"In {town} there is light rain at {t} °C and a wind of {wind} km/h.",
        f"Warmer than {other}?",
        json.dumps({"name": "get_weather", "arguments": {"town": other, "units": "metric"}}),
        f"Tool result: {json.dumps({'celsius': u, 'wind_kmh': d.between(2, 60), 'sky': 'clear'})}",
        f"{town} is {than if t != u else 'just as warm as'} {other}, where it's {u} °C.",
    )


# ---- markdown --------------------------------------------------------------------------------
def league(d: Dice, _: str) -> str:
    teams = d.some(TOWNS, 5)
    table = {t: [0, 0, 0, 0, 0] for t in teams}  # won, drawn, lost, for, against
    results = []
    for i, home in enumerate(teams):
        for away in teams[i + 1 :]:
            a, b = d.below(5), d.below(4)
            results.append(f"- {home} – {away} {a}:{b}")
            for team, x, y in ((home, a, b), (away, b, a)):
                row = table[team]
                row[0 if x > y else 1 if x == y else 2] += 1
                row[3] += x
                row[4] += y

    def rank(team: str) -> tuple[int, int, str]:
        won, drawn, _, scored, conceded = table[team]
        return -(3 * won + drawn), conceded - scored, team

    order = sorted(teams, key=rank)
    lines = ["| | Team | W | D | L | Goals | Points |", "|---|---|---|---|---|---|---|"]
    for place, t in enumerate(order, 1):
        w, dr, lo, f, a = table[t]
        lines.append(f"| {place} | {t} | {w} | {dr} | {lo} | {f}:{a} | {3 * w + dr} |")
    return f"## Tournament of {order[0]}\n\n" + "\n".join(results) + "\n\n" + "\n".join(lines)


def invoice(d: Dice, _: str) -> str:
    lines = ["| Pos. | Article | Quantity | Unit price | Amount |", "|---:|---|---:|---:|---:|"]
    net = 0
    for i, good in enumerate(d.some(GOODS, 6), 1):
        n, cents = d.between(1, 40), d.between(45, 18000)
        net += n * cents
        lines.append(f"| {i} | {good} | {n} | {cents / 100:.2f} | {n * cents / 100:,.2f} |")
    rate = d.pick((7, 19, 20, 21, 25))
    tax = round(net * rate / 100)
    total = f"**total {(net + tax) / 100:,.2f} EUR**"
    return "\n".join(
        [
            f"**Invoice {d.between(2019, 2024)}-{d.between(1000, 9999)}**\n",
            f"To: {d.pick(NAMES)}, {d.pick(TOWNS)}\n",
            *lines,
            f"\nNet {net / 100:,.2f} EUR, VAT {rate} % {tax / 100:,.2f} EUR, {total}. "
            f"Payable within {d.pick((10, 14, 21, 30))} days.",
        ]
    )


def climate(d: Dice, _: str) -> str:
    months = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"]
    mean, swing = d.between(30, 160), d.between(40, 120)
    temps = [
        (mean - round(swing * math.cos(math.tau * (i - 0.6) / 12)) + d.between(-9, 9)) / 10
        for i in range(12)
    ]
    rain = [d.between(8, 130) for _ in months]
    lines = ["| Month | °C | mm |", "|:---|---:|---:|"]
    lines += [f"| {m} | {t:.1f} | {r} |" for m, t, r in zip(months, temps, rain, strict=True)]
    warm, wet = months[temps.index(max(temps))], months[rain.index(max(rain))]
    return "\n".join(
        [
            f"### Station {d.pick(NOUNS).capitalize()} Hill, {d.between(12, 1900)} m\n",
            *lines,
            f"\nYear: {sum(temps) / 12:.1f} °C, {sum(rain)} mm. Warmest {warm}, wettest {wet}.",
        ]
    )


def matrices(d: Dice, _: str) -> str:
    out = [f"**Matrix products for {d.pick(NAMES)}, with the determinant as a check**"]
    for i in range(3):
        a, b = ([[d.between(-5, 9) for _ in "xy"] for _ in "xy"] for _ in "ab")
        c = [[sum(a[r][k] * b[k][s] for k in (0, 1)) for s in (0, 1)] for r in (0, 1)]

        def tex(m: list[list[int]]) -> str:
            rows = r" \\ ".join(" & ".join(map(str, row)) for row in m)
            return rf"\begin{{pmatrix}} {rows} \end{{pmatrix}}"

        da, db, dc = (m[0][0] * m[1][1] - m[0][1] * m[1][0] for m in (a, b, c))
        out.append(
            f"{i + 1}. $${tex(a)} {tex(b)} = {tex(c)}$$\n   "
            rf"$\det A = {da}$, $\det B = {db}$, "
            rf"$\det AB = {da} \cdot {db if db >= 0 else f'({db})'} = {dc}$."
        )
    return "\n\n".join(out)


def timetable(d: Dice, _: str) -> str:
    stops, runs = d.some(TOWNS, 7), 5
    gaps = [d.between(6, 48) for _ in stops[1:]]
    starts = [d.between(300, 340) + 120 * i + d.pick((0, 5, 10, 30)) for i in range(runs)]
    lines = [
        "| km | | " + " | ".join(f"Train {d.between(100, 999)}" for _ in range(runs)) + " |",
        "|---:|---|" + "---|" * runs,
    ]
    km, passed = 0, 0
    for i, stop in enumerate(stops):
        if i:
            km += gaps[i - 1] * 3 // 2
            passed += gaps[i - 1]
        cells = [f"{(s + passed) // 60:02d}:{(s + passed) % 60:02d}" for s in starts]
        lines.append(f"| {km} | {stop} | " + " | ".join(cells) + " |")
    return "\n".join(
        [
            f"**{stops[0]} – {stops[-1]}**\n",
            *lines,
            f"\nTravel time {passed // 60} h {passed % 60} min, {km} km, "
            f"{km * 60 / passed:.0f} km/h on average.",
        ]
    )


def statistics(d: Dice, _: str) -> str:
    xs = [d.between(2, 60) for _ in range(8)]
    n, mean = len(xs), sum(xs) / 8
    dev = [x - mean for x in xs]
    squares = sum(v * v for v in dev)
    s = math.sqrt(squares / (n - 1))
    return "\n".join(
        [
            f"*{d.pick(NAMES)}, {d.pick(NOUNS)} counts, eight days.* "
            f"$\\sum x_i = {sum(xs)}$, $\\bar x = {mean:.3f}$.\n",
            "| $x_i$ | $x_i - \\bar x$ | $(x_i - \\bar x)^2$ |",
            "|---:|---:|---:|",
            *(f"| {x} | {v:.3f} | {v * v:.3f} |" for x, v in zip(xs, dev, strict=True)),
            f"\n$$s^2 = \\frac{{{squares:.3f}}}{{{n - 1}}} = {squares / (n - 1):.3f}, "
            f"\\qquad s = {s:.3f}$$\n",
            f"Standard error ${s:.3f} / \\sqrt{{8}} = {s / math.sqrt(8):.3f}$.",
        ]
    )


PLAN: tuple[tuple[str, Callable[[Dice, str], str], tuple[str, ...]], ...] = (
    ("code", python_record, ("shipment", "turbine")),
    ("dialogue", products, ("a", "b")),
    ("markdown", league, ("a", "b")),
    ("code", access_log, ("a", "b")),
    ("code", typescript_store, ("sensor", "loan")),
    ("dialogue", to_json, ("booking", "vessel", "track")),
    ("markdown", invoice, ("a", "b", "c")),
    ("code", sql_table, ("seedling", "parcel_locker")),
    ("dialogue", discounts, ("a", "b")),
    ("code", service_log, ("a", "b")),
    ("markdown", matrices, ("a", "b")),
    ("code", rust_parser, ("recipe_step", "booking")),
    ("dialogue", equations, ("a", "b")),
    ("code", json_records, ("game_piece", "patient_bed", "loan")),
    ("markdown", climate, ("a", "b", "c")),
    ("code", shell_session, ("a", "b")),
    ("dialogue", dates, ("a", "b")),
    ("code", go_handler, ("vessel", "track")),
    ("dialogue", word_lists, ("a", "b", "c")),
    ("code", yaml_services, ("harbour", "bakery")),
    ("dialogue", factors, ("a", "b")),
    ("code", c_record, ("seedling", "game_piece")),
    ("markdown", timetable, ("a", "b", "c")),
    ("code", patch, ("sensor", "recipe_step")),
    ("dialogue", tool_calls, ("a", "b")),
    ("code", css_form, ("patient_bed", "turbine")),
    ("markdown", statistics, ("a", "b")),
)


def generated() -> list[Document]:
    """All generated documents, first one of every sort, then the second ones, and so on."""
    out = []
    for turn in range(max(len(names) for _, _, names in PLAN)):
        for kind, make, names in PLAN:
            if turn < len(names):
                name = names[turn]
                out.append((kind, make(Dice(f"{make.__name__} {name}"), name).strip("\n")))
    return out


def split(text: str) -> list[Document]:
    """The documents of a calibration text. Raises ValueError where it has no first kind line."""
    out: list[tuple[str, list[str]]] = []
    for line in text.removesuffix("\n").split("\n"):
        if line.startswith(MARK):
            out.append((line.removeprefix(MARK), []))
        elif not out:
            raise ValueError(f"the text must begin with a line {MARK}KIND, not {line[:40]!r}")
        else:
            out[-1][1].append(line)
    return [(kind, "\n".join(lines)) for kind, lines in out]


def written(documents: Sequence[Document]) -> list[Document]:
    """The hand-written ones among all documents: those whose place is not a generated one's."""
    last = EVERY * len(generated())
    return [doc for i, doc in enumerate(documents) if i >= last or i % EVERY != EVERY - 1]


def join(by_hand: Sequence[Document]) -> str:
    """The whole text. Raises ValueError if there are too few hand-written documents."""
    made = generated()
    if len(by_hand) < (EVERY - 1) * len(made):
        raise ValueError(
            f"{len(made)} generated documents need {(EVERY - 1) * len(made)} "
            f"hand-written ones, there are {len(by_hand)}"
        )
    out = list(by_hand)
    for i, doc in enumerate(made):
        out.insert(EVERY * i + EVERY - 1, doc)
    return "".join(f"{MARK}{kind}\n{body}\n" for kind, body in out)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Make the generated part of calibration.txt")
    parser.add_argument("--check", action="store_true", help="write nothing, fail on a difference")
    check = parser.parse_args(arguments).check
    path = Path(__file__).with_name("calibration.txt")
    old = path.read_bytes()
    new = join(written(split(old.decode()))).encode()
    if check:
        sys.stderr.write("as it should be\n" if old == new else "calibration.txt differs\n")
        return int(old != new)
    path.write_bytes(new)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
