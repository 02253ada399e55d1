// Numbers, times and amounts in words. Everything here is pure.

const INTEGER = new Intl.NumberFormat("en");
const SHORT = new Intl.NumberFormat("en", { maximumSignificantDigits: 3 });
const EVEN = new Intl.NumberFormat("en", { minimumSignificantDigits: 3, maximumSignificantDigits: 3 });

export function count(number) {
  return INTEGER.format(number);
}

// A rate with its digits where they matter: 0.2, 3.4, 56, 1,230.
export function rate(number) {
  if (number === 0) return "0";
  return number >= 100 ? INTEGER.format(Math.round(number)) : SHORT.format(number);
}

// Three digits, so that figures below each other have their places below each other.
function three(number) {
  return number >= 1000 ? INTEGER.format(Math.floor(number)) : EVEN.format(number);
}

export function bytes(number) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
  let unit = 0;
  let value = number;
  while (value >= 1024 && unit < units.length - 1) {
    value /= 1024;
    unit += 1;
  }
  return `${unit === 0 ? INTEGER.format(value) : three(value)} ${units[unit]}`;
}

export function span(ms) {
  const seconds = Math.max(0, Math.floor(ms / 1000));
  if (seconds < 60) return `${seconds} s`;
  const minutes = Math.floor(seconds / 60);
  if (minutes < 60) return `${minutes} min`;
  const hours = Math.floor(minutes / 60);
  if (hours < 48) return minutes % 60 ? `${hours} h ${minutes % 60} min` : `${hours} h`;
  return `${Math.floor(hours / 24)} days`;
}

// 10:15:02; of another day: 24 Nov 10:15:02.
export function clock(ms, nowMs) {
  const then = new Date(ms);
  const time = then.toISOString().slice(11, 19);
  if (then.toISOString().slice(0, 10) === new Date(nowMs).toISOString().slice(0, 10)) return time;
  const day = new Intl.DateTimeFormat("en-GB", { day: "numeric", month: "short", timeZone: "UTC" });
  return `${day.format(then)} ${time}`;
}

export function since(ms, nowMs) {
  return `since ${clock(ms, nowMs)} UTC (${span(nowMs - ms)})`;
}

// An amount of a meter in the unit that is billed, by its UCUM unit.
export function amount(value, unit) {
  if (unit === "By") return bytes(value);
  if (unit !== "s") return count(value);
  if (value < 120) return `${count(value)} s`;
  return value < 7200 ? `${three(value / 60)} min` : `${three(value / 3600)} h`;
}

export function meterName(name) {
  const names = {
    requests: "Requests",
    ingress_bytes: "Bytes in",
    egress_bytes: "Bytes out",
    connection_seconds: "Open time",
  };
  return names[name] ?? name;
}

export const FATES = {
  delivered: "delivered",
  delivered_ambiguous: "delivered, perhaps twice",
  unconfirmed: "unconfirmed",
  dead: "dead letters",
  recorded: "recorded only",
  merged: "merged",
  before_start: "before from",
  after_end: "after until",
  elsewhere: "elsewhere",
  redated: "redated",
  retired: "retired",
};
