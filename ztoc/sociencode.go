package ztoc

import (
	"encoding/binary"
	"fmt"

	flatbuffers "github.com/google/flatbuffers/go"
)

// EncodeSOCI writes z as SOCI's ztoc 0.9, which SOCI reads, with the same bytes SOCI would write for
// the same content. Only gzip and plain tar layers can be said in it, and no sparse files:
// ErrUnsupported otherwise.
func EncodeSOCI(z *Ztoc) ([]byte, error) {
	if z.Format != FormatGzip && z.Format != FormatTar {
		return nil, fmt.Errorf("%w: SOCI has no ztoc for a %s layer", ErrUnsupported, z.Format)
	}
	n := int64(z.NumSpans())
	if n == 0 {
		return nil, fmt.Errorf("%w: SOCI has no ztoc for an empty layer", ErrUnsupported)
	}
	if z.Format == FormatGzip && n*sociCheckpoint > maxSOCI {
		return nil, fmt.Errorf("%w: SOCI's ztoc would have %d bytes of windows, more than a flatbuffer can", ErrUnsupported, n*sociCheckpoint)
	}
	es, err := z.Entries()
	if err != nil {
		return nil, err
	}
	var points []byte
	if z.Format == FormatTar {
		points = z.sociTarCheckpoints()
	} else if points, err = z.sociGzipCheckpoints(); err != nil {
		return nil, err
	}
	return z.encodeSOCI(es, points)
}

// encodeSOCI writes the flatbuffer of z with these entries and checkpoints.
func (z *Ztoc) encodeSOCI(es []Entry, points []byte) ([]byte, error) {
	n := z.NumSpans()
	size := int64(len(points)) + int64(n)*80 + z.toc.raw + int64(len(es))*256
	if size > maxSOCI {
		return nil, fmt.Errorf("%w: SOCI's ztoc for this layer would have %d bytes, more than a flatbuffer can", ErrUnsupported, size)
	}
	// Strings and tables are written from the end of the buffer in the order they are made, so the
	// order of calls below is the order SOCI's writer has.
	b := flatbuffers.NewBuilder(int(size))
	version := b.CreateString(sociVersion)
	tool := b.CreateString(z.Tool)
	files := make([]flatbuffers.UOffsetT, len(es))
	for i := len(es) - 1; i >= 0; i-- {
		if es[i].Sparse != nil {
			return nil, fmt.Errorf("%w: %.200q is a sparse file, whose holes SOCI's ztoc cannot say", ErrUnsupported, es[i].Name)
		}
		files[i] = sociFile(b, &es[i])
	}
	metadata := offsetVector(b, files)
	b.StartObject(1)
	b.PrependUOffsetTSlot(0, metadata, 0)
	toc := b.EndObject()

	algorithm := int8(sociGzip)
	if z.Format == FormatTar {
		algorithm = sociTar
	}
	pointsAt := b.CreateByteVector(points)
	digests := make([]flatbuffers.UOffsetT, n)
	for i := range digests {
		r := z.row(i)
		digests[i] = b.CreateString(string(DigestFromSum(r.digest)))
	}
	digestsAt := offsetVector(b, digests)
	b.StartObject(4)
	b.PrependInt32Slot(fbMaxSpan, int32(n-1), 0)
	b.PrependUOffsetTSlot(fbDigests, digestsAt, 0)
	b.PrependUOffsetTSlot(fbCheckpoints, pointsAt, 0)
	b.PrependInt8Slot(fbAlgorithm, algorithm, sociGzip)
	info := b.EndObject()

	b.StartObject(6)
	b.PrependUOffsetTSlot(fbVersion, version, 0)
	b.PrependUOffsetTSlot(fbTool, tool, 0)
	b.PrependUOffsetTSlot(fbTOC, toc, 0)
	b.PrependInt64Slot(fbBlobSize, z.BlobSize, 0)
	b.PrependInt64Slot(fbTarSize, z.TarSize, 0)
	b.PrependUOffsetTSlot(fbInfo, info, 0)
	b.Finish(b.EndObject())
	return b.FinishedBytes(), nil
}

func offsetVector(b *flatbuffers.Builder, offsets []flatbuffers.UOffsetT) flatbuffers.UOffsetT {
	b.StartVector(4, len(offsets), 4)
	for i := len(offsets) - 1; i >= 0; i-- {
		b.PrependUOffsetT(offsets[i])
	}
	return b.EndVector(len(offsets))
}

func sociFile(b *flatbuffers.Builder, e *Entry) flatbuffers.UOffsetT {
	name := b.CreateString(e.Name)
	typ := b.CreateString(sociTypes[e.Type])
	link := b.CreateString(e.Linkname)
	uname := b.CreateString(e.Uname)
	gname := b.CreateString(e.Gname)
	// A time that RFC 3339 cannot write (before year 0, after 9999) is an empty string, as SOCI does it,
	// and comes back as the zero time.
	var text []byte
	if !e.ModTime.IsZero() {
		text, _ = e.ModTime.MarshalText()
	}
	modTime := b.CreateString(string(text))
	records := make([]flatbuffers.UOffsetT, len(e.PAX))
	for i, r := range e.PAX {
		key := b.CreateString(r.Key)
		value := b.CreateString(r.Value)
		b.StartObject(2)
		b.PrependUOffsetTSlot(0, key, 0)
		b.PrependUOffsetTSlot(1, value, 0)
		records[i] = b.EndObject()
	}
	pax := offsetVector(b, records)

	b.StartObject(14)
	b.PrependUOffsetTSlot(fbName, name, 0)
	b.PrependUOffsetTSlot(fbType, typ, 0)
	b.PrependInt64Slot(fbOffset, e.Offset, 0)
	b.PrependInt64Slot(fbSize, e.Size, 0)
	b.PrependUOffsetTSlot(fbLink, link, 0)
	b.PrependInt64Slot(fbMode, e.Mode, 0)
	b.PrependUint32Slot(fbUID, uint32(e.UID), 0)
	b.PrependUint32Slot(fbGID, uint32(e.GID), 0)
	b.PrependUOffsetTSlot(fbUname, uname, 0)
	b.PrependUOffsetTSlot(fbGname, gname, 0)
	b.PrependUOffsetTSlot(fbTime, modTime, 0)
	b.PrependInt64Slot(fbMajor, e.Devmajor, 0)
	b.PrependInt64Slot(fbMinor, e.Devminor, 0)
	b.PrependUOffsetTSlot(fbPAX, pax, 0)
	return b.EndObject()
}

func (z *Ztoc) sociTarCheckpoints() []byte {
	b := flatbuffers.NewBuilder(0)
	b.StartObject(3)
	b.PrependInt32Slot(0, sociTarVersion, 0)
	b.PrependInt64Slot(1, z.SpanSize, 0)
	b.PrependInt64Slot(2, z.BlobSize, 0)
	b.Finish(b.EndObject())
	return b.FinishedBytes()
}

func (z *Ztoc) sociGzipCheckpoints() ([]byte, error) {
	n := z.NumSpans()
	b := make([]byte, 0, 12+n*sociCheckpoint)
	le := binary.LittleEndian
	b = le.AppendUint32(b, uint32(n))
	b = le.AppendUint64(b, uint64(z.SpanSize))
	var w [windowSize]byte
	for i := range n {
		if i == 0 && z.implied {
			continue
		}
		r := z.row(i)
		in := r.blob
		if r.bits > 0 {
			in++
		}
		if err := z.window(&w, &r); err != nil {
			return nil, fmt.Errorf("span %d: %w", i, err)
		}
		b = le.AppendUint64(b, uint64(in))
		b = le.AppendUint64(b, uint64(r.out))
		b = append(b, r.bits)
		b = append(b, w[:]...)
	}
	return b, nil
}
