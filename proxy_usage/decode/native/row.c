#include "row.h"

/* Numbers of the fields that are read, a bit each: als.proto says what they are. */
#define BIT(number) ((uint64_t)1 << (number))

static const uint64_t known_common = BIT(4) | BIT(5) | BIT(6) | BIT(8) | BIT(10) | BIT(12) | BIT(15) | BIT(16)
    | BIT(17) | BIT(19) | BIT(22) | BIT(23) | BIT(27) | BIT(29) | BIT(30) | BIT(33);

void prepare_fields(wanted_fields *wants)
{
    wants->tags.count = wants->headers.count = 0;
    wants->constants = 0;
    for (unsigned number = 0; number < wants->count; number++) {
        field_kind kind = wants->fields[number].kind;
        wants->constants |= kind == FROM_SOURCE;
        if (kind != FROM_TAG && kind != FROM_HEADER)
            continue;
        wanted_keys *keys = kind == FROM_TAG ? &wants->tags : &wants->headers;
        memcpy(&keys->heads[keys->count], wants->fields[number].path[0].at + 1, sizeof *keys->heads);
        keys->numbers[keys->count++] = (uint8_t)number;
    }
}

/* A message of numbers alone: walked so that it is certain to be one. Present messages inside have no fields of use. */
static inline int read_nothing(span rest)
{
    field found;
    while (rest.at < rest.end)
        if (!read_field(&rest, &found))
            return 0;
    return 1;
}

/* A Timestamp or a Duration of no negative part; what is not below a second in `nanos` is odd. */
static inline int read_time(span rest, uint64_t *seconds, uint64_t *nanos)
{
    field found;
    uint64_t seen = 0;
    *seconds = *nanos = 0;
    if (rest.at < rest.end && *rest.at == TAG(1, VARINT)) { /* as every encoder writes it: seconds, then nanos */
        rest.at++;
        if (!read_varint(&rest, seconds))
            return 0;
        seen = BIT(1);
    }
    if (rest.at < rest.end && *rest.at == TAG(2, VARINT)) {
        rest.at++;
        if (!read_varint(&rest, nanos))
            return 0;
        seen |= BIT(2);
    }
    while (rest.at < rest.end) {
        if (!read_field(&rest, &found))
            return 0;
        if (found.tag == TAG(1, VARINT))
            *seconds = found.value;
        else if (found.tag == TAG(2, VARINT))
            *nanos = found.value;
        else if (is_known(BIT(1) | BIT(2), found.tag))
            return 0;
        else
            continue;
        if (!once(&seen, found.tag))
            return 0;
    }
    return *nanos < 1000000000u;
}

static int read_flags(span rest, uint32_t *flags)
{
    field found;
    uint64_t seen = 0;
    while (rest.at < rest.end) {
        if (!read_field(&rest, &found))
            return 0;
        uint32_t number = found.tag >> 3;
        if (number > 28)
            continue;
        if ((found.tag & 7) != (number == 13 ? BYTES : VARINT) || !once(&seen, found.tag))
            return 0;
        if (number == 13 ? !read_nothing(found.bytes) : !found.value) {
            if (number == 13)
                return 0;
            continue;
        }
        *flags |= (uint32_t)1 << number;
    }
    return 1;
}

static int read_tls(span rest, span *sni)
{
    field found;
    uint64_t seen = 0;
    while (rest.at < rest.end) {
        if (!read_field(&rest, &found))
            return 0;
        if (found.tag == TAG(3, BYTES)) {
            if (!once(&seen, found.tag))
                return 0;
            *sni = found.bytes;
        } else if (is_known(BIT(3), found.tag))
            return 0;
    }
    return 1;
}

/* The value of an entry that begins with `key`. Returns 0 where it is odd, 1 where it is another's, 2 if found. */
static inline int read_entry(span entry, span key, span *value)
{
    if (entry.at == entry.end)
        return 1;
    if (*entry.at == TAG(2, BYTES))
        return 0; /* the value before the key */
    size_t size = length(key);
    if (length(entry) < size || memcmp(entry.at, key.at, size) != 0)
        return 1;
    entry.at += size;
    if (value->at != NULL)
        return 0; /* a key that comes twice */
    if (entry.at == entry.end) {
        *value = entry;
        return 2;
    }
    field found;
    if (!read_field(&entry, &found) || found.tag != TAG(2, BYTES) || entry.at != entry.end)
        return 0;
    *value = found.bytes;
    return 2;
}

static inline int read_entries(const wanted_keys *keys, span entry, const wanted_fields *wants, span *values)
{
    if (entry.at < entry.end && *entry.at == TAG(2, BYTES))
        return 0;
    if (length(entry) < 1 + sizeof(uint16_t))
        return 1; /* no key of ours is so short */
    uint16_t head;
    memcpy(&head, entry.at + 1, sizeof head);
    for (unsigned index = 0; index < keys->count; index++) {
        unsigned number = keys->numbers[index];
        if (keys->heads[index] == head && !read_entry(entry, wants->fields[number].path[0], &values[number]))
            return 0;
    }
    return 1;
}

/* The only field of a message, which must have `tag`. */
static int read_only(span rest, uint32_t tag, span *bytes)
{
    field found;
    if (!read_field(&rest, &found) || found.tag != tag || rest.at != rest.end)
        return 0;
    *bytes = found.bytes;
    return 1;
}

/* The string at a path inside metadata; anything else that is there is odd. */
static int read_metadata(span struct_, const wanted *want, span *value)
{
    for (unsigned level = 0; level < want->depth; level++) {
        span inside = {NULL, NULL};
        while (struct_.at < struct_.end) {
            field found;
            if (!read_field(&struct_, &found))
                return 0;
            if (found.tag == TAG(1, BYTES)) {
                if (!read_entry(found.bytes, want->path[level], &inside))
                    return 0;
            } else if (is_known(BIT(1), found.tag))
                return 0;
        }
        if (inside.at == inside.end) /* absent, or an empty value */
            return 1;
        if (level + 1 == want->depth)
            return level > 0 && read_only(inside, TAG(3, BYTES), value);
        if (level == 0)
            struct_ = inside;
        else if (!read_only(inside, TAG(5, BYTES), &struct_))
            return 0;
    }
    return 1;
}

static int read_common(span rest, const wanted_fields *wants, row *out)
{
    field found;
    uint64_t seen = 0, ignored;
    while (rest.at < rest.end) {
        if (!read_field(&rest, &found))
            return 0;
        switch (found.tag) {
        case TAG(22, BYTES):
            if (!read_entries(&wants->tags, found.bytes, wants, out->values))
                return 0;
            continue;
        case TAG(4, BYTES):
            if (!read_tls(found.bytes, &out->sni))
                return 0;
            break;
        case TAG(5, BYTES):
            if (!read_time(found.bytes, &out->start_s, &out->start_ns))
                return 0;
            break;
        case TAG(6, BYTES):
        case TAG(8, BYTES):
        case TAG(10, BYTES):
        case TAG(12, BYTES):
            if (!read_time(found.bytes, &ignored, &ignored))
                return 0;
            break;
        case TAG(23, BYTES):
            if (!read_time(found.bytes, &out->open_s, &out->open_ns))
                return 0;
            out->has_duration = 1;
            break;
        case TAG(15, BYTES): out->cluster = found.bytes; break;
        case TAG(16, BYTES):
            if (!read_flags(found.bytes, &out->flags))
                return 0;
            break;
        case TAG(17, BYTES): out->metadata = found.bytes; break;
        case TAG(19, BYTES): out->route = found.bytes; break;
        case TAG(27, VARINT): out->intermediate = found.value; break;
        case TAG(29, VARINT): out->wire_out = found.value; break;
        case TAG(30, VARINT): out->wire_in = found.value; break;
        case TAG(33, VARINT): out->type = found.value; break;
        default:
            if (is_known(known_common, found.tag))
                return 0;
            continue;
        }
        if (!once(&seen, found.tag))
            return 0;
    }
    return 1;
}

static int read_request(span rest, const wanted_fields *wants, row *out)
{
    field found;
    uint64_t seen = 0;
    while (rest.at < rest.end) {
        if (!read_field(&rest, &found))
            return 0;
        switch (found.tag) {
        case TAG(13, BYTES):
            if (!read_entries(&wants->headers, found.bytes, wants, out->values))
                return 0;
            continue;
        case TAG(1, VARINT): out->method = found.value; break;
        case TAG(3, BYTES): out->authority = found.bytes; break;
        case TAG(12, VARINT): out->body_in = found.value; break;
        default:
            if (is_known(BIT(1) | BIT(3) | BIT(12) | BIT(13), found.tag))
                return 0;
            continue;
        }
        if (!once(&seen, found.tag))
            return 0;
    }
    return 1;
}

static int read_status(span rest, uint64_t *status)
{
    field found;
    uint64_t seen = 0;
    while (rest.at < rest.end) {
        if (!read_field(&rest, &found))
            return 0;
        if (found.tag == TAG(1, VARINT)) {
            if (!once(&seen, found.tag))
                return 0;
            *status = found.value;
        } else if (is_known(BIT(1), found.tag))
            return 0;
    }
    return *status <= UINT32_MAX;
}

static int read_response(span rest, row *out)
{
    field found;
    uint64_t seen = 0;
    while (rest.at < rest.end) {
        if (!read_field(&rest, &found))
            return 0;
        switch (found.tag) {
        case TAG(1, BYTES):
            if (!read_status(found.bytes, &out->status))
                return 0;
            break;
        case TAG(3, VARINT): out->body_out = found.value; break;
        case TAG(6, BYTES): out->details = found.bytes; break;
        default:
            if (is_known(BIT(1) | BIT(3) | BIT(6), found.tag))
                return 0;
            continue;
        }
        if (!once(&seen, found.tag))
            return 0;
    }
    return 1;
}

static int read_connection(span rest, row *out)
{
    field found;
    uint64_t seen = 0;
    while (rest.at < rest.end) {
        if (!read_field(&rest, &found))
            return 0;
        if (found.tag == TAG(1, VARINT))
            out->body_in = found.value;
        else if (found.tag == TAG(2, VARINT))
            out->body_out = found.value;
        else if (is_known(BIT(1) | BIT(2), found.tag))
            return 0;
        else
            continue;
        if (!once(&seen, found.tag))
            return 0;
    }
    return 1;
}

/* The values that are not found in maps while these are read. */
static int finish(const wanted_fields *wants, row *out)
{
    for (unsigned index = 0; index < wants->count; index++) {
        switch (wants->fields[index].kind) {
        case FROM_ROUTE: out->values[index] = out->route; break;
        case FROM_AUTHORITY: out->values[index] = out->authority; break;
        case FROM_SNI: out->values[index] = out->sni; break;
        case FROM_METADATA:
            if (!read_metadata(out->metadata, &wants->fields[index], &out->values[index]))
                return 0;
            break;
        default: break;
        }
    }
    return out->type <= INT32_MAX && out->method <= INT32_MAX;
}

int read_http(span rest, const wanted_fields *wants, row *out)
{
    field found;
    uint64_t seen = 0;
    while (rest.at < rest.end) {
        if (!read_field(&rest, &found))
            return 0;
        int good;
        switch (found.tag) {
        case TAG(1, BYTES): good = read_common(found.bytes, wants, out); break;
        case TAG(3, BYTES): good = read_request(found.bytes, wants, out); break;
        case TAG(4, BYTES): good = read_response(found.bytes, out); break;
        default:
            if (is_known(BIT(1) | BIT(3) | BIT(4), found.tag))
                return 0;
            continue;
        }
        if (!good || !once(&seen, found.tag))
            return 0;
    }
    return finish(wants, out);
}

int read_tcp(span rest, const wanted_fields *wants, row *out)
{
    field found;
    uint64_t seen = 0;
    while (rest.at < rest.end) {
        if (!read_field(&rest, &found))
            return 0;
        int good;
        switch (found.tag) {
        case TAG(1, BYTES): good = read_common(found.bytes, wants, out); break;
        case TAG(2, BYTES): good = read_connection(found.bytes, out); break;
        default:
            if (is_known(BIT(1) | BIT(2), found.tag))
                return 0;
            continue;
        }
        if (!good || !once(&seen, found.tag))
            return 0;
    }
    return finish(wants, out);
}
