/* Reads rows from a file, each behind its length in four bytes, and walks each in memory of exactly its size.

   Under AddressSanitizer a byte read behind a row ends the process. */

#include "row.h"

#include <stdio.h>
#include <stdlib.h>

static span key(const char *text, size_t size)
{
    const uint8_t *at = (const uint8_t *)text;
    return (span){at, at + size};
}

int main(int count, char **arguments)
{
    static wanted_fields wants = {.count = 6};
    wants.fields[0] = (wanted){FROM_TAG, 1, {key("\x0a\x0cproject_name", 14)}};
    wants.fields[1] = (wanted){FROM_HEADER, 1, {key("\x0a\x09x-project", 11)}};
    wants.fields[2] = (wanted){FROM_METADATA, 3,
                               {key("\x0a\x05" "datum", 7), key("\x0a\x07project", 9), key("\x0a\x04name", 6)}};
    wants.fields[3] = (wanted){FROM_ROUTE, 0, {{NULL, NULL}}};
    wants.fields[4] = (wanted){FROM_AUTHORITY, 0, {{NULL, NULL}}};
    wants.fields[5] = (wanted){FROM_SNI, 0, {{NULL, NULL}}};
    prepare_fields(&wants);
    FILE *file = count == 2 ? fopen(arguments[1], "rb") : NULL;
    uint32_t size;
    unsigned long rows = 0, plain = 0, sum = 0;
    while (file != NULL && fread(&size, sizeof size, 1, file) == 1) {
        uint8_t *raw = malloc(size ? size : 1);
        if (raw == NULL || fread(raw, 1, size, file) != size)
            return 2;
        for (int http = 0; http < 2; http++) {
            row found = {0};
            span whole = {raw, raw + size};
            int good = http ? read_http(whole, &wants, &found) : read_tcp(whole, &wants, &found);
            for (unsigned index = 0; good && index < wants.count; index++)
                for (const uint8_t *at = found.values[index].at; at != found.values[index].end; at++)
                    sum += *at; /* what is handed out is within the row, too */
            plain += (unsigned long)good;
        }
        rows++;
        free(raw);
    }
    printf("%lu rows, %lu plain, %lu\n", rows, plain, sum);
    return file == NULL;
}
