/* Protobuf's wire format, read strictly: what is not plain is "odd" and left to protobuf itself.

   Nothing here reads at or behind `end`. Odd are groups, field numbers above 2047, tags and lengths that are longer
   than need be, and numbers of ten bytes (negative ones, and those from 2^63 on). */

#ifndef FOLD_WIRE_H
#define FOLD_WIRE_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#ifdef __GNUC__
#define ALWAYS static inline __attribute__((always_inline))
#else
#define ALWAYS static inline
#endif

typedef struct {
    const uint8_t *at;
    const uint8_t *end;
} span;

typedef struct {
    uint32_t tag; /* field number and wire type, as on the wire */
    uint64_t value; /* of a varint */
    span bytes; /* of a length-delimited field */
} field;

enum { VARINT = 0, FIXED64 = 1, BYTES = 2, FIXED32 = 5 };

#define TAG(number, type) ((uint32_t)((number) << 3 | (type)))

static inline size_t length(span text) { return (size_t)(text.end - text.at); }

/* A number of up to nine bytes. Returns 0 where there is none. */
ALWAYS int read_varint(span *rest, uint64_t *value)
{
    const uint8_t *at = rest->at;
    if (at < rest->end && *at < 0x80) {
        *value = *at;
        rest->at = at + 1;
        return 1;
    }
    uint64_t sum = 0;
    for (unsigned shift = 0; at < rest->end && shift < 63; shift += 7) {
        uint8_t byte = *at++;
        sum |= (uint64_t)(byte & 0x7f) << shift;
        if (byte < 0x80) {
            *value = sum;
            rest->at = at;
            return 1;
        }
    }
    return 0;
}

/* A length in its shortest form, and the bytes that it is the length of. */
ALWAYS int read_bytes(span *rest, span *bytes)
{
    const uint8_t *begun = rest->at;
    uint64_t size;
    if (!read_varint(rest, &size) || (rest->at - begun > 1 && rest->at[-1] == 0) || size > length(*rest))
        return 0;
    bytes->at = rest->at;
    bytes->end = rest->at = rest->at + size;
    return 1;
}

/* The next field of a message that is not at its end. Returns 0 where it is odd. */
ALWAYS int read_field(span *rest, field *found)
{
    uint32_t tag = *rest->at++;
    if (tag >= 0x80) {
        if (rest->at == rest->end || *rest->at == 0 || *rest->at >= 0x80)
            return 0;
        tag = (tag & 0x7f) | (uint32_t)*rest->at++ << 7;
    }
    if (tag < 8) /* field number 0 */
        return 0;
    *found = (field){tag, 0, {NULL, NULL}};
    switch (tag & 7) {
    case VARINT:
        return read_varint(rest, &found->value);
    case BYTES:
        return read_bytes(rest, &found->bytes);
    case FIXED64:
    case FIXED32: {
        size_t size = (tag & 7) == FIXED64 ? 8 : 4;
        if (length(*rest) < size)
            return 0;
        rest->at += size;
        return 1;
    }
    default:
        return 0;
    }
}

/* Whether a field has a number of `known` (a bit each, below 64), so that its wire type was not the expected one. */
static inline int is_known(uint64_t known, uint32_t tag)
{
    return tag < TAG(64, 0) && (known >> (tag >> 3) & 1);
}

/* Marks a field that may come once. Returns 0 when it was there before. */
static inline int once(uint64_t *seen, uint32_t tag)
{
    uint64_t bit = (uint64_t)1 << (tag >> 3);
    int fresh = !(*seen & bit);
    *seen |= bit;
    return fresh;
}

#endif
