/* One row into the table. fold.py and timing.py have the same in Python, step by step, for every row that is odd. */

#include "walker.h"

#include <stdlib.h>

#define NS_PER_MS 1000000u
#define NS_PER_SECOND 1000000000u
#define MAX_BYTES ((uint64_t)1 << 60)
#define MAX_SUM ((uint64_t)1 << 62)
#define MAX_DURATION_NS ((uint64_t)400 * 86400 * NS_PER_SECOND)
#define MAX_START_SECONDS (((uint64_t)1 << 63) / NS_PER_SECOND - 1)
#define MAX_VERDICTS ((uint32_t)1 << 18)
#define SWITCHED 101
#define CONNECT 6
#define METHODS 10
#define DOWNSTREAM_END 6

static int is(span text, const char *other, size_t size)
{
    return length(text) == size && memcmp(text.at, other, size) == 0;
}

static inline int no_value(span text) { return length(text) == 1 && *text.at == '-'; }

static int grow_verdicts(walker *self)
{
    uint32_t count = self->verdicts ? 2 * (self->verdict_mask + 1) : 256;
    if (count > MAX_VERDICTS) { /* full: what is in use is back after one question each */
        memset(self->verdicts, 0, ((size_t)self->verdict_mask + 1) * sizeof(verdict));
        self->verdict_count = 0;
        return 1;
    }
    verdict *fresh = calloc(count, sizeof *fresh);
    if (fresh == NULL)
        return 0;
    for (uint32_t index = 0; self->verdicts != NULL && index <= self->verdict_mask; index++) {
        verdict known = self->verdicts[index];
        uint32_t at = (uint32_t)known.first & (count - 1);
        if (!known.first)
            continue;
        while (fresh[at].first)
            at = (at + 1) & (count - 1);
        fresh[at] = known;
    }
    free(self->verdicts);
    self->verdicts = fresh;
    self->verdict_mask = count - 1;
    return 1;
}

int ask(walker *self, unsigned question, span text)
{
    /* 127 bits of two hashes with secrets of their own stand for question and text. */
    hash_key first = self->secrets[1], second = self->secrets[2];
    first.secret[0] += question;
    second.secret[0] += question;
    verdict wanted = {hash_bytes(&first, text.at, length(text)) | 1, hash_bytes(&second, text.at, length(text)) & ~1ull};
    uint32_t at = 0;
    if (self->verdicts != NULL)
        for (at = (uint32_t)wanted.first & self->verdict_mask; self->verdicts[at].first;
             at = (at + 1) & self->verdict_mask)
            if (self->verdicts[at].first == wanted.first && (self->verdicts[at].second & ~1ull) == wanted.second)
                return (int)(self->verdicts[at].second & 1);
    PyObject *answer = PyObject_CallFunction(self->judge, "Iy#", question, text.at == NULL ? "" : (const char *)text.at,
                                             (Py_ssize_t)length(text));
    if (answer == NULL)
        return -1;
    int is_true = PyObject_IsTrue(answer);
    Py_DECREF(answer);
    if (is_true < 0)
        return -1;
    if (self->verdicts == NULL || 2 * (self->verdict_count + 1) > self->verdict_mask) {
        if (!grow_verdicts(self))
            return is_true;
    }
    for (at = (uint32_t)wanted.first & self->verdict_mask; self->verdicts[at].first; at = (at + 1) & self->verdict_mask)
        ;
    self->verdicts[at] = (verdict){wanted.first, wanted.second | (uint64_t)is_true};
    self->verdict_count++;
    return is_true;
}

/* Whether a row meets a skip test: as SkipTest.meets_row. */
static int meets(walker *self, const skip_test *test, const row *found)
{
    if (test->statuses != NULL) {
        PyObject *status = PyLong_FromUnsignedLongLong(found->status);
        if (status == NULL)
            return -1;
        int contained = PySet_Contains(test->statuses, status);
        Py_DECREF(status);
        if (contained != 1)
            return contained;
    }
    if (test->wants_flags && !(test->flags & found->flags))
        return 0;
    if (!(test->methods >> (found->method < METHODS ? found->method : 0) & 1))
        return 0;
    if (test->details >= 0) {
        int met = ask(self, (unsigned)test->details, found->details);
        if (met != 1)
            return met;
    }
    return test->route < 0 ? 1 : ask(self, (unsigned)test->route, found->route);
}

static int skips(walker *self, const source *from, const row *found)
{
    for (unsigned index = 0; index < self->test_count; index++) {
        if (!(from->tests >> index & 1))
            continue;
        int met = meets(self, &self->tests[index], found);
        if (met != 0)
            return met < 0 ? -1 : self->tests[index].number;
    }
    return 0;
}

static uint8_t *put_text(uint8_t *at, const uint8_t *end, span text)
{
    size_t size = length(text);
    if ((size_t)(end - at) < size + 3)
        return NULL;
    if (size < LONG) {
        *at++ = (uint8_t)size;
    } else {
        *at++ = LONG;
        *at++ = (uint8_t)size;
        *at++ = (uint8_t)(size >> 8);
    }
    if (size)
        memcpy(at, text.at, size);
    return at + size;
}

/* The field of the rule that takes the row and in `*rule` its number; ~number of the first with a value if none does. */
static int choose(walker *self, const row *found, int *rule)
{
    int field = -1;
    *rule = -1;
    for (unsigned number = 0; number < self->rules; number++) {
        span value = found->values[self->rule_fields[number]];
        if (value.at == value.end || no_value(value))
            continue;
        int taken = self->plain >> number & 1 ? 1 : ask(self, number, value);
        if (taken < 0)
            return -2;
        if (taken) {
            *rule = (int)number;
            return self->rule_fields[number];
        }
        if (field < 0) {
            *rule = ~(int)number;
            field = self->rule_fields[number];
        }
    }
    return field;
}

static int put(walker *self, const row *found, uint16_t number, uint32_t window, const uint64_t *amounts)
{
    uint8_t key[MAX_KEY], *at = key + KEY_HEAD, *end = key + sizeof key;
    int rule, field = choose(self, found, &rule);
    if (field == -2)
        return -1;
    memcpy(key, &window, 4);
    memcpy(key + 4, &number, 2);
    int routed = found->route.at != found->route.end || found->cluster.at != found->cluster.end;
    key[6] = (uint8_t)(2 * (rule + MAX_FIELDS) + routed); /* a rule is -MAX_FIELDS at least: ~rule was refused */
    at = put_text(at, end, field < 0 ? (span){NULL, NULL} : found->values[field]);
    for (unsigned index = 0; index < self->dimensions && at != NULL; index++) {
        span value = found->values[self->dimension_fields[index]];
        if (self->dimension_fields[index] == field) {
            if (at == end)
                return 0;
            *at++ = SAME;
        } else
            at = put_text(at, end, no_value(value) ? (span){NULL, NULL} : value);
    }
    if (at == NULL)
        return 0;
    table_row *into = table_find(self->sums, &self->secrets[0], key, (size_t)(at - key));
    if (into == NULL)
        return 0;
    table_sum *sums = table_sums(self->sums, into);
    for (unsigned column = 0; column < self->columns; column++)
        if (sums[column] + amounts[self->column_of[column]] > MAX_SUM)
            return 0;
    if (into->count == UINT32_MAX)
        return 0;
    into->count++;
    for (unsigned column = 0; column < self->columns; column++)
        sums[column] += amounts[self->column_of[column]];
    return 1;
}

/* A row that was read: what fold_row returns. */
static int book(walker *self, const source *from, const row *found, int http, uint64_t now_ms)
{
    int handling = found->type < MAX_TYPES ? from->handling[http][found->type] : CAREFUL;
    if (handling >= HTTP_END_UNTYPED && handling < FIRST_SKIP) {
        if (found->intermediate)
            return 0;
        handling -= HTTP_END_UNTYPED - HTTP_END;
    }
    if (handling == CAREFUL)
        return 0;
    if (handling >= FIRST_SKIP) {
        self->fates[handling - FIRST_SKIP + FIRST_NAMED]++;
        return 1;
    }
    if (http && is(found->details, "internal_redirect", 17)) {
        self->fates[INTERNAL_REDIRECT]++;
        return 1;
    }
    int skipped = from->tests ? skips(self, from, found) : 0;
    if (skipped) {
        if (skipped > 0)
            self->fates[skipped]++;
        return skipped > 0 ? 1 : -1;
    }
    uint64_t body_in = found->body_in, body_out = found->body_out, wire_in = found->wire_in, wire_out = found->wire_out;
    int upgraded = found->status == SWITCHED
        || (found->method == CONNECT && found->status >= 200 && found->status < 300);
    if (!http) {
        upgraded = handling == TCP_END;
        if (upgraded) {
            wire_in = body_in;
            wire_out = body_out;
        }
    }
    if ((wire_in | wire_out | body_in | body_out) >= MAX_BYTES)
        return 0;
    /* When: a row that does not say how long its stream was open is left to the careful path. */
    if (!found->has_duration || found->start_s > MAX_START_SECONDS || found->open_s > MAX_DURATION_NS / NS_PER_SECOND)
        return 0;
    uint64_t start_ns = found->start_s * NS_PER_SECOND + found->start_ns;
    uint64_t open_ns = found->open_s * NS_PER_SECOND + found->open_ns;
    if (open_ns > MAX_DURATION_NS || open_ns >= self->finished_below_ns)
        return 0;
    uint64_t at_ns = start_ns ? start_ns + open_ns : now_ms * NS_PER_MS;
    int future = at_ns > (now_ms + self->skew_ms) * NS_PER_MS;
    int past = !future && now_ms > self->horizon_ms && at_ns < (now_ms - self->horizon_ms) * NS_PER_MS;
    uint64_t at_ms = future || past ? now_ms : at_ns / NS_PER_MS;
    if (at_ms / self->window_ms > UINT32_MAX)
        return 0;
    uint64_t amounts[QUANTITIES] = {
        handling == HTTP_END, wire_in, wire_out, body_in, body_out, open_ns, upgraded ? open_ns : 0, 0,
    };
    int done = put(self, found, (uint16_t)(from - self->sources), (uint32_t)(at_ms / self->window_ms), amounts);
    if (done > 0) {
        self->fates[COUNTED]++;
        self->notes[NO_START_TIME] += !start_ns;
        self->notes[FUTURE] += (uint64_t)future;
        self->notes[PAST_HORIZON] += (uint64_t)past;
    }
    return done;
}

int fold_row(walker *self, source *from, span raw, int http, uint64_t now_ms)
{
    row found;
    memset(&found, 0, offsetof(row, values) + self->wants.count * sizeof *found.values);
    for (unsigned index = 0; self->wants.constants && index < self->wants.count; index++) {
        if (self->wants.fields[index].kind == FROM_SOURCE) {
            PyObject *constant = PyTuple_GET_ITEM(from->constants, index);
            found.values[index].at = (const uint8_t *)PyBytes_AS_STRING(constant);
            found.values[index].end = found.values[index].at + PyBytes_GET_SIZE(constant);
        }
    }
    if (!(http ? read_http(raw, &self->wants, &found) : read_tcp(raw, &self->wants, &found)))
        return 0;
    int done = book(self, from, &found, http, now_ms);
    from->ended += done > 0 && http && found.type == DOWNSTREAM_END;
    return done;
}
