/* A message taken apart: where its rows are. framing.py has the same in Python, and the damage that is odd here. */

#include "module.h"

static spans *spans_new(PyObject *raw, Py_ssize_t count)
{
    spans *self = PyObject_New(spans, &spans_type);
    if (self == NULL)
        return NULL;
    self->raw = NULL;
    self->count = count;
    self->places = PyMem_New(uint32_t, 2 * (size_t)(count ? count : 1));
    if (self->places == NULL) {
        Py_DECREF(self);
        return (spans *)PyErr_NoMemory();
    }
    self->raw = Py_NewRef(raw);
    return self;
}

static void spans_dealloc(spans *self)
{
    Py_XDECREF(self->raw);
    PyMem_Free(self->places);
    PyObject_Free(self);
}

static Py_ssize_t spans_length(spans *self) { return self->count; }

static PyObject *spans_item(spans *self, Py_ssize_t index)
{
    if (index < 0 || index >= self->count) {
        PyErr_SetString(PyExc_IndexError, "no such row");
        return NULL;
    }
    span raw = spans_get(self, index);
    return PyBytes_FromStringAndSize((const char *)raw.at, (Py_ssize_t)length(raw));
}

static PyObject *spans_subscript(spans *self, PyObject *key)
{
    if (!PySlice_Check(key)) {
        Py_ssize_t index = PyNumber_AsSsize_t(key, PyExc_IndexError);
        if (index == -1 && PyErr_Occurred())
            return NULL;
        return spans_item(self, index < 0 ? index + self->count : index);
    }
    Py_ssize_t start, stop, step;
    if (PySlice_Unpack(key, &start, &stop, &step) < 0)
        return NULL;
    Py_ssize_t count = PySlice_AdjustIndices(self->count, &start, &stop, step);
    spans *part = spans_new(self->raw, count);
    if (part == NULL)
        return NULL;
    for (Py_ssize_t index = 0; index < count; index++, start += step)
        memcpy(part->places + 2 * index, self->places + 2 * start, 2 * sizeof(uint32_t));
    return (PyObject *)part;
}

static PySequenceMethods spans_sequence = {
    .sq_length = (lenfunc)spans_length,
    .sq_item = (ssizeargfunc)spans_item,
};
static PyMappingMethods spans_mapping = {
    .mp_length = (lenfunc)spans_length,
    .mp_subscript = (binaryfunc)spans_subscript,
};

PyTypeObject spans_type = {
    PyVarObject_HEAD_INIT(NULL, 0)
    .tp_name = "proxy_usage.decode._fold.Spans",
    .tp_doc = "Rows of a message, still closed: a sequence of bytes, each made when it is asked for.",
    .tp_basicsize = sizeof(spans),
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_SEQUENCE,
    .tp_dealloc = (destructor)spans_dealloc,
    .tp_as_sequence = &spans_sequence,
    .tp_as_mapping = &spans_mapping,
};

typedef struct {
    uint32_t *places;
    size_t count;
    size_t room;
} places;

static int add_place(places *list, uint32_t start, uint32_t size)
{
    if (list->count == list->room) {
        size_t room = list->room ? 2 * list->room : 64;
        uint32_t *grown = PyMem_Resize(list->places, uint32_t, 2 * room);
        if (grown == NULL) {
            PyErr_NoMemory();
            return 0;
        }
        list->places = grown;
        list->room = room;
    }
    list->places[2 * list->count] = start;
    list->places[2 * list->count++ + 1] = size;
    return 1;
}

enum { MORE, END, ODD };
enum { OUTSIDE = 0, HTTP_LOGS = 2, TCP_LOGS = 3 }; /* the latter are field numbers in the message */

PyObject *scan(PyObject *Py_UNUSED(module), PyObject *arguments)
{
    PyObject *raw;
    Py_ssize_t pos, stop, size, rows;
    int inside, state = MORE;
    if (!PyArg_ParseTuple(arguments, "Sninnn:scan", &raw, &pos, &inside, &stop, &size, &rows))
        return NULL;
    const uint8_t *begin = (const uint8_t *)PyBytes_AS_STRING(raw);
    Py_ssize_t whole = PyBytes_GET_SIZE(raw), begun = pos;
    if (whole > UINT32_MAX || pos < 0 || stop < pos || whole < stop) {
        PyErr_SetString(PyExc_ValueError, "not within the message");
        return NULL;
    }
    places http = {NULL, 0, 0}, tcp = {NULL, 0, 0};
    PyObject *result = NULL;
    while (state == MORE && pos - begun < size && (Py_ssize_t)(http.count + tcp.count) < rows) {
        if (pos == stop) {
            if (inside == OUTSIDE)
                state = END;
            inside = OUTSIDE;
            stop = whole;
            continue;
        }
        span rest = {begin + pos, begin + stop};
        field found;
        if (!read_field(&rest, &found)) {
            state = ODD;
        } else if (inside == OUTSIDE && (found.tag == TAG(HTTP_LOGS, BYTES) || found.tag == TAG(TCP_LOGS, BYTES))) {
            inside = (int)(found.tag >> 3);
            pos = found.bytes.at - begin;
            stop = found.bytes.end - begin;
        } else {
            pos = rest.at - begin;
            if (inside != OUTSIDE && found.tag == TAG(1, BYTES)
                && !add_place(inside == HTTP_LOGS ? &http : &tcp, (uint32_t)(found.bytes.at - begin),
                              (uint32_t)length(found.bytes)))
                goto done;
        }
    }
    if (state == MORE && inside == OUTSIDE && pos == stop)
        state = END;
    spans *entries = spans_new(raw, (Py_ssize_t)(http.count + tcp.count));
    if (entries == NULL)
        goto done;
    if (http.count)
        memcpy(entries->places, http.places, 2 * http.count * sizeof(uint32_t));
    if (tcp.count)
        memcpy(entries->places + 2 * http.count, tcp.places, 2 * tcp.count * sizeof(uint32_t));
    result = Py_BuildValue("Nninni", entries, (Py_ssize_t)http.count, pos, inside, stop, state);
done:
    PyMem_Free(http.places);
    PyMem_Free(tcp.places);
    return result;
}
