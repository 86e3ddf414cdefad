package origin

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"github.com/muster-hpc/muster/ztoc"
)

// layout is an OCI image layout directory.
type layout struct {
	ref Reference
	dir string
}

var _ Repository = (*layout)(nil)

const (
	refName        = "org.opencontainers.image.ref.name"
	containerdName = "io.containerd.image.name"
)

func openLayout(ref Reference) (*layout, error) {
	l := &layout{ref: ref, dir: ref.Layout}
	b, err := l.file("oci-layout", 4<<10)
	if err != nil {
		return nil, l.fail("", err, "an OCI layout has the files oci-layout, index.json and blobs/ (umoci, skopeo copy docker://… oci:…)")
	}
	var v struct {
		Version string `json:"imageLayoutVersion"`
	}
	if json.Unmarshal(b, &v) != nil || !strings.HasPrefix(v.Version, "1.") {
		return nil, &Error{Image: ref.String(), Message: fmt.Sprintf("version %.20q of the layout", v.Version), Err: ErrUnsupported}
	}
	return l, nil
}

func (l *layout) Reference() Reference { return l.ref }
func (l *layout) RangesIgnored() bool  { return false }

// fail puts names and a sentinel on a file system's error.
func (l *layout) fail(op string, err error, next string) error {
	var e *Error
	if errors.As(err, &e) || errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		return err
	}
	sentinel := ErrUnreachable
	switch {
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, syscall.ENOTDIR):
		sentinel = ErrNotFound
	case errors.Is(err, fs.ErrPermission):
		sentinel = ErrUnauthorized
	case errors.Is(err, ErrUnsupported), strings.Contains(err.Error(), "escapes from parent"): // package os has no sentinel for it
		sentinel = ErrUnsupported
	}
	return &Error{Op: op, Image: l.ref.String(), Message: strings.TrimPrefix(clean(err.Error()), sentinel.Error()+": "), Next: next, Err: sentinel, Cause: err}
}

// open opens a regular file of the layout. Symbolic links may not lead out of it, and nothing that
// blocks or has side effects when opened is waited for.
func (l *layout) open(name string) (*os.File, int64, error) {
	root, err := os.OpenRoot(l.dir)
	if err != nil {
		return nil, 0, err
	}
	defer root.Close()
	f, err := root.OpenFile(name, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, 0, err
	}
	st, err := f.Stat()
	if err == nil && !st.Mode().IsRegular() {
		err = fmt.Errorf("%w: %s is not a regular file", ErrUnsupported, name)
	}
	if err != nil {
		f.Close()
		return nil, 0, err
	}
	return f, st.Size(), nil
}

func (l *layout) file(name string, limit int64) ([]byte, error) {
	f, size, err := l.open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if size > limit {
		return nil, fmt.Errorf("%w: %s has %d bytes, at most %d are read", ErrUnsupported, name, size, limit)
	}
	b, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err == nil && int64(len(b)) > limit {
		err = fmt.Errorf("%w: %s grows while it is read", ErrUnsupported, name)
	}
	return b, err
}

func blobName(d ztoc.Digest) string { return "blobs/sha256/" + d.Hex() }

func (l *layout) Blob(ctx context.Context, d ztoc.Digest, r ztoc.Range) (io.ReadCloser, error) {
	if err := ctx.Err(); err != nil {
		return nil, context.Cause(ctx)
	}
	if _, err := ztoc.ParseDigest(string(d)); err != nil {
		return nil, usage(string(d), "not a digest", "")
	}
	all := r == ztoc.Range{}
	if r.Start < 0 || !all && r.Empty() {
		return nil, usage(r.String(), "not a range of a blob", "")
	}
	op := "blob " + string(d)
	f, size, err := l.open(blobName(d))
	if err != nil {
		return nil, l.fail(op, err, "check that the layout is complete")
	}
	if all {
		r.End = size
	}
	if r.End > size {
		f.Close()
		return nil, &Error{Op: op, Image: l.ref.String(), Message: fmt.Sprintf("the file has %d bytes, byte %d was asked for", size, r.End-1), Next: "check that the copy of the layout is complete", Err: ErrDigest}
	}
	return &fileBody{ctx: ctx, l: l, op: op, f: f, next: r.Start, end: r.End}, nil
}

// fileBody reads [next, end) of a file.
type fileBody struct {
	ctx  context.Context
	l    *layout
	op   string
	f    *os.File
	next int64
	end  int64
}

func (b *fileBody) Read(p []byte) (int, error) {
	if b.next == b.end {
		return 0, io.EOF
	}
	if b.ctx.Err() != nil {
		return 0, context.Cause(b.ctx)
	}
	n, err := b.f.ReadAt(p[:min(int64(len(p)), b.end-b.next)], b.next)
	b.next += int64(n)
	if n > 0 || len(p) == 0 {
		return n, nil
	}
	if err == io.EOF {
		err = io.ErrUnexpectedEOF // cut while we read
	}
	return 0, b.l.fail(b.op, err, "")
}

func (b *fileBody) Close() error { return b.f.Close() }

func (l *layout) index() (manifest, error) {
	b, err := l.file("index.json", MaxDocument)
	if err != nil {
		return manifest{}, l.fail("index.json", err, "")
	}
	m, err := parseManifest(MediaTypeIndex, b)
	if err == nil && !m.index {
		err = fmt.Errorf("%w: index.json is not an index", ErrProtocol)
	}
	if err != nil {
		return m, imageError(l.ref, "index.json", err)
	}
	return m, nil
}

// tagged reports whether a descriptor of index.json has a tag: as itself, or as the tag of a full name
// (containerd and docker write both).
func tagged(d Descriptor, tag string) bool {
	for _, k := range []string{refName, containerdName} {
		if n := d.Annotations[k]; n == tag || strings.HasSuffix(n, ":"+tag) && !strings.Contains(tag, "/") {
			return true
		}
	}
	return false
}

func (l *layout) Manifest(ctx context.Context, target string) (Manifest, error) {
	if ctx.Err() != nil {
		return Manifest{}, context.Cause(ctx)
	}
	d, err := ztoc.ParseDigest(target)
	if err != nil {
		idx, err := l.index()
		if err != nil {
			return Manifest{}, err
		}
		i := slices.IndexFunc(idx.manifests, func(d Descriptor) bool { return tagged(d, target) })
		if i < 0 {
			return Manifest{}, &Error{Op: "manifest " + clean(target), Image: l.ref.String(), Message: "the layout has " + l.names(idx), Err: ErrNotFound}
		}
		d = idx.manifests[i].Digest
	}
	op := "manifest " + string(d)
	b, err := l.file(blobName(d), MaxDocument)
	if err != nil {
		return Manifest{}, l.fail(op, err, "check that the layout is complete")
	}
	if got := ztoc.DigestOf(b); got != d {
		return Manifest{}, &Error{Op: op, Image: l.ref.String(), Message: "the file hashes to " + string(got), Err: ErrDigest}
	}
	m, err := parseManifest("", b)
	if err != nil {
		return Manifest{}, imageError(l.ref, op, err)
	}
	return Manifest{MediaType: m.mediaType, Digest: d, Body: b}, nil
}

func (l *layout) names(idx manifest) string {
	tags := tagsOf(idx)
	if len(tags) == 0 {
		return fmt.Sprintf("no tags and %d images", len(idx.manifests))
	}
	more := ""
	if len(tags) > 20 {
		tags, more = tags[:20], ", …"
	}
	return "the tags " + clean(strings.Join(tags, ", ")+more)
}

func tagsOf(idx manifest) []string {
	var tags []string
	for _, d := range idx.manifests {
		if n := d.Annotations[refName]; n != "" {
			tags = append(tags, n)
		}
	}
	slices.Sort(tags)
	return slices.Compact(tags)
}

func (l *layout) Tags(context.Context) ([]string, error) {
	idx, err := l.index()
	return tagsOf(idx), err
}

func (l *layout) Resolve(ctx context.Context, wish string) (Image, error) {
	target := l.ref.target()
	if target == "" {
		idx, err := l.index()
		if err != nil {
			return Image{Ref: l.ref}, err
		}
		want, err := parsePlatform(wish)
		if err != nil {
			return Image{Ref: l.ref}, err
		}
		switch images := plainImages(idx); {
		case len(images) == 1:
			target = string(images[0].Digest)
		case len(images) > 1 && len(tagsOf(idx)) == 0:
			d, err := manifest{manifests: images}.choose(want) // index.json as the image's index
			if err != nil {
				return Image{Ref: l.ref}, imageError(l.ref, "", err)
			}
			target = string(d.Digest)
		default:
			return Image{Ref: l.ref}, &Error{Image: l.ref.String(), Message: "the layout has " + l.names(idx), Next: "say which: oci:" + l.dir + ":TAG", Err: ErrUsage}
		}
	}
	return resolve(ctx, l, l.ref, target, wish)
}

// plainImages are the entries of index.json that are images: no referrers.
func plainImages(idx manifest) []Descriptor {
	var out []Descriptor
	for _, d := range idx.manifests {
		if imageConfig(d.ArtifactType) {
			out = append(out, d)
		}
	}
	return out
}

// Referrers reads every manifest that index.json lists and keeps those about subject.
func (l *layout) Referrers(ctx context.Context, subject ztoc.Digest, artifactType string) (Referrers, error) {
	idx, err := l.index()
	if err != nil {
		return Referrers{}, err
	}
	out := Referrers{}
	for _, d := range idx.manifests {
		if d.Annotations[refName] == fallbackTag(subject) {
			// A registry's fallback tag, copied with everything else.
			if m, err := l.Manifest(ctx, string(d.Digest)); err == nil {
				if p, err := parseManifest(m.MediaType, m.Body); err == nil && p.index {
					for _, d := range p.manifests {
						l.addReferrer(ctx, &out, d, subject, artifactType)
					}
				}
			}
			continue
		}
		l.addReferrer(ctx, &out, d, subject, artifactType)
	}
	if ctx.Err() != nil {
		return Referrers{}, context.Cause(ctx)
	}
	slices.SortFunc(out.Manifests, func(a, b Descriptor) int { return strings.Compare(string(a.Digest), string(b.Digest)) })
	out.Manifests = slices.CompactFunc(out.Manifests, func(a, b Descriptor) bool { return a.Digest == b.Digest })
	if len(out.Manifests) == 0 {
		out.Reason = "nothing in the layout refers to it"
	}
	return out, nil
}

// addReferrer enters d if it is about subject and of the type wished for. A manifest that cannot be read
// is another image's trouble.
func (l *layout) addReferrer(ctx context.Context, out *Referrers, d Descriptor, subject ztoc.Digest, artifactType string) {
	m, err := l.Manifest(ctx, string(d.Digest))
	if err != nil {
		return
	}
	p, err := parseManifest(m.MediaType, m.Body)
	if err != nil || p.subject != subject || artifactType != "" && p.kind() != artifactType {
		return
	}
	d.ArtifactType = p.kind()
	out.Manifests = append(out.Manifests, d)
}

func (l *layout) PushBlob(ctx context.Context, ref ztoc.BlobRef, open func() (io.ReadCloser, error)) error {
	op := "write of blob " + string(ref.Digest)
	if _, err := ztoc.ParseDigest(string(ref.Digest)); err != nil {
		return usage(string(ref.Digest), "not a digest", "")
	}
	if f, size, err := l.open(blobName(ref.Digest)); err == nil {
		f.Close()
		if size == ref.Size {
			return nil
		}
	}
	src, err := open()
	if err != nil {
		return fmt.Errorf("reading what is to be pushed: %w", err)
	}
	defer src.Close()
	if err := l.write(ctx, blobName(ref.Digest), src, ref); err != nil {
		return l.fail(op, err, "")
	}
	return nil
}

// write makes a file of the layout, whole or not at all; with a digest in ref it is checked.
func (l *layout) write(ctx context.Context, name string, src io.Reader, ref ztoc.BlobRef) error {
	path := filepath.Join(l.dir, filepath.FromSlash(name))
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	f, err := os.CreateTemp(filepath.Dir(path), ".muster-*")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name()) // no longer there once renamed
	defer f.Close()
	h := newHash()
	n, err := io.Copy(io.MultiWriter(f, h), &ctxReader{ctx, src})
	if err != nil {
		return err
	}
	if ref.Digest != "" && (n != ref.Size || h.digest() != ref.Digest) {
		return &Error{Op: "write of blob " + string(ref.Digest), Image: l.ref.String(), Message: fmt.Sprintf("%d bytes that hash to %s", n, h.digest()), Err: ErrDigest}
	}
	if err := errors.Join(f.Chmod(0o644), f.Close()); err != nil {
		return err
	}
	return os.Rename(f.Name(), path)
}

func (l *layout) PushManifest(ctx context.Context, mediaType string, body []byte, tag string) (ztoc.Digest, error) {
	d := ztoc.DigestOf(body)
	op := "write of manifest " + string(d)
	m, err := parseManifest(mediaType, body)
	if err != nil {
		return "", imageError(l.ref, op, err)
	}
	if err := l.write(ctx, blobName(d), bytes.NewReader(body), ztoc.BlobRef{Digest: d, Size: int64(len(body))}); err != nil {
		return "", l.fail(op, err, "")
	}
	if tag == "" && m.subject == "" {
		return d, nil // reached through an index that names it
	}
	desc := Descriptor{MediaType: m.mediaType, Digest: d, Size: int64(len(body)), ArtifactType: m.artifactType}
	if tag != "" {
		desc.Annotations = map[string]string{refName: tag}
	}
	return d, l.enter(ctx, desc, tag)
}

// enter puts desc into index.json, in the place of what had its tag. Other muster processes are kept out
// by a lock on the file oci-layout, which nobody replaces.
func (l *layout) enter(ctx context.Context, desc Descriptor, tag string) error {
	lock, err := os.Open(filepath.Join(l.dir, "oci-layout"))
	if err != nil {
		return l.fail("index.json", err, "")
	}
	defer lock.Close()
	for try := 0; ; try++ {
		err := syscall.Flock(int(lock.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
		if err == nil {
			break
		}
		if !errors.Is(err, syscall.EWOULDBLOCK) && !errors.Is(err, syscall.EINTR) {
			return l.fail("index.json", err, "")
		}
		if err := sleep(ctx, jitter(min(try, 3))); err != nil {
			return err
		}
	}
	// What is there is kept as it stands, unknown fields included.
	b, err := l.file("index.json", MaxDocument)
	if err != nil {
		return l.fail("index.json", err, "")
	}
	var doc map[string]json.RawMessage
	var list []json.RawMessage
	err = json.Unmarshal(b, &doc)
	if err == nil && doc["manifests"] != nil {
		err = json.Unmarshal(doc["manifests"], &list)
	}
	if err != nil || doc == nil {
		return &Error{Op: "index.json", Image: l.ref.String(), Message: "not JSON", Err: ErrProtocol}
	}
	list = slices.DeleteFunc(list, func(raw json.RawMessage) bool {
		var d jsonDescriptor
		if json.Unmarshal(raw, &d) != nil {
			return false
		}
		if tag != "" {
			return d.Annotations[refName] == tag
		}
		return d.Digest == desc.Digest && d.Annotations[refName] == ""
	})
	entry, err := json.Marshal(desc.json())
	if err != nil {
		return err
	}
	if doc["manifests"], err = json.Marshal(append(list, entry)); err != nil {
		return err
	}
	if b, err = json.Marshal(doc); err != nil {
		return err
	}
	if err := l.write(ctx, "index.json", bytes.NewReader(b), ztoc.BlobRef{}); err != nil {
		return l.fail("index.json", err, "")
	}
	return nil
}
