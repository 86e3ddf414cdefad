"""Writes deflate streams, whole and mutated, and what zlib makes of them, to standard output.

usage: streams.py COUNT SEED

Each is: kind (1 byte: D raw deflate, G a gzip member), verdict (1 byte: K fine, T cut short, E
malformed), bytes of the stream that zlib used, length of the stream, length of the output (4 bytes
each, little endian), the stream, the output. Of a malformed stream the output is not given.
"""

import random
import struct
import sys
import zlib

count, seed = int(sys.argv[1]), int(sys.argv[2])
r = random.Random(seed)
noise = r.randbytes(70_000)
words = [noise[i * 5 : i * 5 + r.randint(2, 9)] for i in range(3000)]


def content():
    size = int(2 ** r.uniform(0, 12))
    kind = r.randrange(6)
    if kind == 0:
        return noise[(i := r.randrange(60_000)) : i + size]
    if kind == 1:
        return bytes([r.randrange(256)]) * size
    if kind == 2:
        return b" ".join(r.choices(words, k=size // 8 + 1))
    if kind == 3:
        return bytes(r.choices(range(r.randint(1, 256)), k=size // 2 + 1))
    if kind == 4:  # a pattern of a short period, changed here and there
        b = bytearray(noise[: r.randint(1, 40)] * (size // 8 + 1))
        for _ in range(r.randrange(4)):
            b[r.randrange(len(b))] ^= 1
        return bytes(b)
    if r.randrange(40):
        return b""
    # a match at any distance a window allows, or just beyond
    distance = r.choice([r.randint(1, 32_770), 32_768, 32_767, 32_506, 32_507, 16_385])
    piece = noise[60_000 : 60_000 + r.randint(3, 600)]
    return piece + noise[: max(0, distance - len(piece))] + piece


flushes = [zlib.Z_SYNC_FLUSH, zlib.Z_FULL_FLUSH, zlib.Z_PARTIAL_FLUSH, zlib.Z_BLOCK]


def stream(wbits):
    c = zlib.compressobj(
        r.choice([0, 1, 1, 4, 6, 6, 9]), zlib.DEFLATED, wbits, r.randint(1, 9), r.choice([0, 0, 0, 1, 2, 3, 4])
    )
    out = b""
    for _ in range(r.choice([1, 1, 1, 2, 3, 6])):
        out += c.compress(content())
        if r.randrange(3) == 0:
            out += c.flush(r.choice(flushes))
    return out + c.flush(zlib.Z_FINISH)


def field():
    return bytes(r.choices(range(1, 256), k=int(2 ** r.uniform(0, 10)))) + b"\0"


def member():
    """A gzip member with any fields in its header."""
    raw = stream(-15)
    flags = r.randrange(32) if r.randrange(8) else r.randrange(256)
    head = b"\x1f\x8b\x08" + bytes([flags]) + r.randbytes(6)
    if flags & 4:
        extra = r.randbytes(r.randrange(300))
        head += struct.pack("<H", len(extra)) + extra
    if flags & 8:
        head += field()
    if flags & 16:
        head += field()
    if flags & 2:
        head += struct.pack("<H", zlib.crc32(head) & 0xFFFF)
    data = zlib.decompress(raw, -15)
    return head + raw + struct.pack("<II", zlib.crc32(data), len(data))


def mutate(b):
    b = bytearray(b)
    for _ in range(r.choice([0, 1, 1, 1, 2, 5])):
        if not b:
            break
        at = min(r.randrange(len(b)), r.randrange(len(b))) if r.randrange(2) else r.randrange(len(b))
        match r.randrange(6):
            case 0:
                del b[at:]
            case 1:
                b[at] = r.randrange(256)
            case 2 | 3:
                b[at] ^= 1 << r.randrange(8)
            case 4:
                del b[at : at + r.randint(1, 8)]
            case _:
                b[at:at] = r.randbytes(r.randint(1, 8))
    return bytes(b)


def scrambled():
    """A block with a header of plausible but random code lengths."""
    bits, n = 0, 0

    def put(value, width):
        nonlocal bits, n
        bits |= value << n
        n += width

    put(r.randrange(2), 1)
    put(2, 2)
    put(r.randrange(32), 5)
    put(r.randrange(32), 5)
    put(r.randrange(16), 4)
    shape = r.choice([[2, 2, 3, 3, 3, 4, 4, 5, 5], [3] * 8, [1, 2, 3, 4, 5, 6, 7, 7], [1], [2, 2, 2, 2], [1, 1]])
    shape = shape + [0] * (19 - len(shape))
    r.shuffle(shape)
    for width in shape:
        put(width, 3)
    return bits.to_bytes((n + 7) // 8, "little") + r.randbytes(r.randrange(400))


out = sys.stdout.buffer
for _ in range(count):
    kind = r.choice("DDDDDDGGS")
    if kind == "S":
        kind, b = "D", scrambled()
    elif kind == "G":
        b = mutate(member())
    else:
        b = mutate(stream(-r.randint(9, 15)))
    d = zlib.decompressobj(31 if kind == "G" else -15)
    try:
        data = d.decompress(b)
        verdict = "K" if d.eof else "T"
    except zlib.error:
        data, verdict = b"", "E"
    used = len(b) - len(d.unused_data)
    out.write(kind.encode() + verdict.encode() + struct.pack("<III", used, len(b), len(data)) + b + data)
