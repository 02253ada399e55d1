/* The walker as Python sees it. _fold.pyi says what the calls mean. */

#include "walker.h"

#include <stdlib.h>

static int refuse(const char *what)
{
    PyErr_SetString(PyExc_ValueError, what);
    return 0;
}

/* `fields`: a tuple of (kind, (key, …)), each key as an entry of a map begins with it. */
static int take_fields(walker *self, PyObject *fields)
{
    Py_ssize_t count = PyTuple_GET_SIZE(fields);
    if (count > MAX_FIELDS)
        return refuse("too many fields");
    self->wants.count = (unsigned)count;
    for (Py_ssize_t index = 0; index < count; index++) {
        wanted *want = &self->wants.fields[index];
        int kind;
        PyObject *keys;
        if (!PyArg_ParseTuple(PyTuple_GET_ITEM(fields, index), "iO!", &kind, &PyTuple_Type, &keys))
            return 0;
        Py_ssize_t depth = PyTuple_GET_SIZE(keys);
        int least = kind == FROM_METADATA ? 1 : kind == FROM_TAG || kind == FROM_HEADER ? 1 : 0;
        if (kind < FROM_TAG || kind > FROM_SOURCE || depth < least || depth > MAX_PATH)
            return refuse("no such field");
        want->kind = (field_kind)kind;
        want->depth = (unsigned)depth;
        for (Py_ssize_t level = 0; level < depth; level++) {
            PyObject *key = PyTuple_GET_ITEM(keys, level);
            if (!PyBytes_Check(key) || PyBytes_GET_SIZE(key) < 3)
                return refuse("a key is bytes: tag, length and a letter at least");
            want->path[level].at = (const uint8_t *)PyBytes_AS_STRING(key);
            want->path[level].end = want->path[level].at + PyBytes_GET_SIZE(key);
        }
    }
    prepare_fields(&self->wants);
    self->keys = Py_NewRef(fields);
    return 1;
}

/* Small numbers, each below `below`. */
static int take_numbers(PyObject *from, unsigned below, unsigned most, uint8_t *numbers, unsigned *count)
{
    if (PyBytes_GET_SIZE(from) > (Py_ssize_t)most)
        return refuse("too many numbers");
    *count = (unsigned)PyBytes_GET_SIZE(from);
    memcpy(numbers, PyBytes_AS_STRING(from), *count);
    for (unsigned index = 0; index < *count; index++)
        if (numbers[index] >= below)
            return refuse("a number is out of range");
    return 1;
}

static int take_tests(walker *self, PyObject *tests)
{
    if (PyTuple_GET_SIZE(tests) > MAX_TESTS)
        return refuse("too many tests");
    for (Py_ssize_t index = 0; index < PyTuple_GET_SIZE(tests); index++) {
        skip_test *test = &self->tests[index];
        PyObject *statuses;
        unsigned int flags, methods;
        if (!PyArg_ParseTuple(PyTuple_GET_ITEM(tests, index), "iOpIIii", &test->number, &statuses, &test->wants_flags,
                              &flags, &methods, &test->details, &test->route))
            return 0;
        if (test->number < FIRST_NAMED || test->number >= MAX_FATES)
            return refuse("no such fate");
        if (statuses != Py_None && !PyAnySet_Check(statuses))
            return refuse("statuses are a set");
        test->flags = flags;
        test->methods = (uint16_t)methods;
        test->statuses = statuses == Py_None ? NULL : Py_NewRef(statuses);
        self->test_count++;
    }
    return 1;
}

static PyObject *walker_new(PyTypeObject *type, PyObject *arguments, PyObject *Py_UNUSED(names))
{
    PyObject *fields, *rule_fields, *dimension_fields, *columns, *judge, *tests, *secret;
    unsigned int plain;
    unsigned long long window_ms, skew_ms, horizon_ms, finished_below_ns;
    if (!PyArg_ParseTuple(arguments, "O!SSSIOO!KKKKS:Walker", &PyTuple_Type, &fields, &rule_fields, &dimension_fields,
                          &columns, &plain, &judge, &PyTuple_Type, &tests, &window_ms, &skew_ms, &horizon_ms,
                          &finished_below_ns, &secret))
        return NULL;
    walker *self = (walker *)type->tp_alloc(type, 0);
    if (self == NULL)
        return NULL;
    self->plain = plain;
    self->judge = Py_NewRef(judge);
    self->window_ms = window_ms;
    self->skew_ms = skew_ms;
    self->horizon_ms = horizon_ms;
    self->finished_below_ns = finished_below_ns;
    int good = take_fields(self, fields)
        && take_numbers(rule_fields, self->wants.count, MAX_FIELDS, self->rule_fields, &self->rules)
        && take_numbers(dimension_fields, self->wants.count, MAX_FIELDS, self->dimension_fields, &self->dimensions)
        && take_numbers(columns, QUANTITIES, MAX_COLUMNS, self->column_of, &self->columns)
        && take_tests(self, tests);
    const unsigned long long most = 1ull << 42;
    if (good && (window_ms == 0 || window_ms > most || skew_ms > most || horizon_ms > most
                 || PyBytes_GET_SIZE(secret) != (Py_ssize_t)sizeof self->secrets))
        good = refuse("a time or the secret is out of range");
    if (good) {
        memcpy(self->secrets, PyBytes_AS_STRING(secret), sizeof self->secrets);
        self->sums = table_new(self->columns);
        if (self->sums == NULL) {
            PyErr_NoMemory();
            good = 0;
        }
    }
    if (!good)
        Py_CLEAR(self);
    return (PyObject *)self;
}

static void forget_sources(walker *self)
{
    for (uint32_t index = 0; index < self->source_count; index++)
        Py_DECREF(self->sources[index].constants);
    self->source_count = 0;
}

static void walker_dealloc(walker *self)
{
    forget_sources(self);
    free(self->sources);
    free(self->verdicts);
    table_free(self->sums);
    for (unsigned index = 0; index < self->test_count; index++)
        Py_XDECREF(self->tests[index].statuses);
    Py_XDECREF(self->keys);
    Py_XDECREF(self->judge);
    Py_TYPE(self)->tp_free((PyObject *)self);
}

static PyObject *walker_source(walker *self, PyObject *arguments)
{
    PyObject *http, *tcp, *constants;
    unsigned long long tests;
    if (!PyArg_ParseTuple(arguments, "SSO!K:source", &http, &tcp, &PyTuple_Type, &constants, &tests))
        return NULL;
    int fits = PyBytes_GET_SIZE(http) == MAX_TYPES && PyBytes_GET_SIZE(tcp) == MAX_TYPES
        && PyTuple_GET_SIZE(constants) == (Py_ssize_t)self->wants.count && self->source_count < MAX_SOURCES;
    for (Py_ssize_t index = 0; fits && index < PyTuple_GET_SIZE(constants); index++)
        fits = PyBytes_Check(PyTuple_GET_ITEM(constants, index));
    for (unsigned type = 0; fits && type < 2 * MAX_TYPES; type++) {
        uint8_t handling = (uint8_t)PyBytes_AS_STRING(type < MAX_TYPES ? http : tcp)[type % MAX_TYPES];
        fits = handling < MAX_FATES - FIRST_NAMED;
    }
    if (!fits) {
        refuse("no such source");
        return NULL;
    }
    if (self->source_count == self->source_room) {
        uint32_t room = self->source_room ? 2 * self->source_room : 16;
        source *grown = realloc(self->sources, room * sizeof *grown);
        if (grown == NULL)
            return PyErr_NoMemory();
        self->sources = grown;
        self->source_room = room;
    }
    source *fresh = &self->sources[self->source_count];
    memcpy(fresh->handling[1], PyBytes_AS_STRING(http), MAX_TYPES);
    memcpy(fresh->handling[0], PyBytes_AS_STRING(tcp), MAX_TYPES);
    fresh->constants = Py_NewRef(constants);
    fresh->tests = tests;
    fresh->ended = 0;
    return PyLong_FromUnsignedLong(self->source_count++);
}

static PyObject *walker_fold(walker *self, PyObject *const *arguments, Py_ssize_t count)
{
    if (count != 4)
        return PyErr_Format(PyExc_TypeError, "fold takes source, entries, http and now_ms");
    size_t number = PyLong_AsSize_t(arguments[0]);
    PyObject *entries = arguments[1];
    Py_ssize_t http = PyLong_AsSsize_t(arguments[2]);
    unsigned long long now_ms = PyLong_AsUnsignedLongLong(arguments[3]);
    if (PyErr_Occurred())
        return NULL;
    int apart = Py_TYPE(entries) == &spans_type;
    if (number >= self->source_count || now_ms > 1ull << 42 || !(apart || PyList_Check(entries))) {
        refuse("source, entries or now_ms is out of range");
        return NULL;
    }
    PyObject *careful = NULL;
    for (Py_ssize_t index = 0; index < (apart ? ((spans *)entries)->count : PyList_GET_SIZE(entries)); index++) {
        span raw;
        if (apart) {
            raw = spans_get((spans *)entries, index);
        } else {
            PyObject *entry = PyList_GET_ITEM(entries, index);
            if (!PyBytes_Check(entry)) {
                refuse("an entry is bytes");
                goto failed;
            }
            raw.at = (const uint8_t *)PyBytes_AS_STRING(entry);
            raw.end = raw.at + PyBytes_GET_SIZE(entry);
        }
        int done = fold_row(self, &self->sources[number], raw, index < http, now_ms);
        if (done < 0)
            goto failed;
        if (done)
            continue;
        PyObject *left = PyLong_FromSsize_t(index);
        if (left == NULL || (careful == NULL && (careful = PyList_New(0)) == NULL)
            || PyList_Append(careful, left) < 0) {
            Py_XDECREF(left);
            goto failed;
        }
        Py_DECREF(left);
    }
    return careful == NULL ? Py_NewRef(Py_None) : careful;
failed:
    Py_XDECREF(careful);
    return NULL;
}

static PyObject *numbers(const uint64_t *from, Py_ssize_t count)
{
    PyObject *list = PyList_New(count);
    for (Py_ssize_t index = 0; list != NULL && index < count; index++) {
        PyObject *number = PyLong_FromUnsignedLongLong(from[index]);
        if (number == NULL)
            Py_CLEAR(list);
        else
            PyList_SET_ITEM(list, index, number);
    }
    return list;
}

static PyObject *walker_take(walker *self, PyObject *Py_UNUSED(none))
{
    PyObject *fates = numbers(self->fates, MAX_FATES), *notes = numbers(self->notes, NOTES);
    PyObject *ended = PyList_New(self->source_count);
    for (uint32_t index = 0; ended != NULL && index < self->source_count; index++) {
        PyObject *number = PyLong_FromUnsignedLongLong(self->sources[index].ended);
        if (number == NULL)
            Py_CLEAR(ended);
        else
            PyList_SET_ITEM(ended, index, number);
    }
    rows *given = PyObject_New(rows, &rows_type);
    table *fresh = table_new(self->columns);
    if (given != NULL)
        given->sums = NULL;
    if (fates == NULL || notes == NULL || ended == NULL || given == NULL || fresh == NULL) {
        Py_XDECREF(fates);
        Py_XDECREF(notes);
        Py_XDECREF(ended);
        Py_XDECREF((PyObject *)given);
        table_free(fresh);
        return PyErr_Occurred() ? NULL : PyErr_NoMemory();
    }
    given->sums = self->sums;
    given->dimensions = self->dimensions;
    given->window_ms = self->window_ms;
    given->chunk = 0;
    given->at = 0;
    given->left = self->sums->rows;
    self->sums = fresh;
    forget_sources(self);
    memset(self->fates, 0, sizeof self->fates);
    memset(self->notes, 0, sizeof self->notes);
    return Py_BuildValue("NNNN", given, fates, notes, ended);
}

static PyObject *walker_rows(walker *self, void *Py_UNUSED(none)) { return PyLong_FromUnsignedLong(self->sums->rows); }

static PyObject *walker_bytes(walker *self, void *Py_UNUSED(none))
{
    return PyLong_FromSize_t(table_allocated(self->sums));
}

static PyObject *walker_held(walker *self, void *Py_UNUSED(none)) { return PyLong_FromSize_t(self->sums->held); }

static PyObject *walker_answers(walker *self, void *Py_UNUSED(none))
{
    return PyLong_FromUnsignedLong(self->verdict_count);
}

static PyMethodDef walker_methods[] = {
    {"source", (PyCFunction)walker_source, METH_VARARGS, NULL},
    {"fold", (PyCFunction)(void (*)(void))walker_fold, METH_FASTCALL, NULL},
    {"take", (PyCFunction)walker_take, METH_NOARGS, NULL},
    {NULL, NULL, 0, NULL},
};
static PyGetSetDef walker_attributes[] = {
    {"rows", (getter)walker_rows, NULL, NULL, NULL},
    {"answers", (getter)walker_answers, NULL, NULL, NULL},
    {"held_bytes", (getter)walker_held, NULL, NULL, NULL},
    {"allocated_bytes", (getter)walker_bytes, NULL, NULL, NULL},
    {NULL, NULL, NULL, NULL, NULL},
};
PyTypeObject walker_type = {
    PyVarObject_HEAD_INIT(NULL, 0)
    .tp_name = "proxy_usage.decode._fold.Walker",
    .tp_doc = "Reads rows and adds them up.",
    .tp_basicsize = sizeof(walker),
    .tp_flags = Py_TPFLAGS_DEFAULT,
    .tp_new = walker_new,
    .tp_dealloc = (destructor)walker_dealloc,
    .tp_methods = walker_methods,
    .tp_getset = walker_attributes,
};
