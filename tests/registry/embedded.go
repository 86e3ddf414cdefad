package registry

import (
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"io"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
)

// embedded is the registry: content by digest in blobs/, names in repos/NAME/{tags,manifests,referrers}.
type embedded struct {
	dir       string
	referrers bool

	mu      sync.Mutex
	uploads map[string]*upload
}

// An upload is a session: bytes arrive in uploads/ID and are hashed on the way.
type upload struct {
	mu   sync.Mutex
	f    *os.File
	hash hash.Hash
	size int64
}

// NewHandler is an embedded registry over dir, which is created.
func NewHandler(dir string, o Options) (http.Handler, error) {
	for _, d := range []string{"blobs/sha256", "uploads", "repos"} {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o755); err != nil {
			return nil, err
		}
	}
	return &embedded{dir: dir, referrers: o.Referrers, uploads: map[string]*upload{}}, nil
}

var (
	reDigest = regexp.MustCompile(`^sha256:[0-9a-f]{64}$`)
	reTag    = regexp.MustCompile(`^[A-Za-z0-9_][A-Za-z0-9._-]{0,127}$`)
	reName   = regexp.MustCompile(`^[a-z0-9]+([._/-]+[a-z0-9]+)*$`)
)

// refuse answers with OCI's list of errors.
func refuse(w http.ResponseWriter, status int, code, message string) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	json.NewEncoder(w).Encode(map[string]any{"errors": []map[string]string{{"code": code, "message": message}}})
}

func (s *embedded) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Docker-Distribution-Api-Version", "registry/2.0")
	q := parsePath(r.URL.Path)
	if q.kind == Ping {
		w.WriteHeader(http.StatusOK)
		return
	}
	if q.kind == Other || !reName.MatchString(q.repo) {
		refuse(w, http.StatusNotFound, "NAME_INVALID", "no such thing in a registry: "+r.URL.Path)
		return
	}
	switch q.kind {
	case Blob:
		s.blob(w, r, q)
	case Upload:
		s.upload(w, r, q)
	case Manifest:
		s.manifest(w, r, q)
	case Tags:
		s.tags(w, r, q)
	case Referrers:
		s.refs(w, r, q)
	}
}

// A Kind is what a request is about.
type Kind string

// The kinds of request.
const (
	Ping      Kind = "ping"
	Blob      Kind = "blob"
	Upload    Kind = "upload"
	Manifest  Kind = "manifest"
	Tags      Kind = "tags"
	Referrers Kind = "referrers"
	Storage   Kind = "storage" // of a blob by signed URL
	Token     Kind = "token"
	Other     Kind = "other"
)

// question is a path of the API taken apart: /v2/REPO/KIND/REF.
type question struct {
	kind Kind
	repo string
	ref  string // digest, tag or upload ID
}

func parsePath(path string) question {
	rest, ok := strings.CutPrefix(path, "/v2/")
	if path == "/v2" || ok && rest == "" {
		return question{kind: Ping}
	}
	if !ok {
		return question{kind: Other}
	}
	for _, k := range []struct {
		infix string
		kind  Kind
	}{{"/blobs/uploads", Upload}, {"/blobs/", Blob}, {"/manifests/", Manifest}, {"/referrers/", Referrers}, {"/tags/list", Tags}} {
		if i := strings.LastIndex(rest, k.infix); i > 0 {
			return question{k.kind, rest[:i], strings.Trim(rest[i+len(k.infix):], "/")}
		}
	}
	return question{kind: Other}
}

func (s *embedded) blobPath(digest string) string {
	return filepath.Join(s.dir, "blobs/sha256", strings.TrimPrefix(digest, "sha256:"))
}

func (s *embedded) repoPath(repo string, more ...string) string {
	return filepath.Join(append([]string{s.dir, "repos", url.PathEscape(repo)}, more...)...)
}

func (s *embedded) blob(w http.ResponseWriter, r *http.Request, q question) {
	if !reDigest.MatchString(q.ref) {
		refuse(w, http.StatusBadRequest, "DIGEST_INVALID", "not a digest")
		return
	}
	switch r.Method {
	case http.MethodGet, http.MethodHead:
		f, err := os.Open(s.blobPath(q.ref))
		if err != nil {
			refuse(w, http.StatusNotFound, "BLOB_UNKNOWN", "blob unknown to registry")
			return
		}
		defer f.Close()
		st, err := f.Stat()
		if err != nil {
			refuse(w, http.StatusInternalServerError, "UNKNOWN", err.Error())
			return
		}
		w.Header().Set("Docker-Content-Digest", q.ref)
		w.Header().Set("Content-Type", "application/octet-stream")
		w.Header().Set("Etag", `"`+q.ref+`"`)
		http.ServeContent(w, r, "", st.ModTime(), f)
	case http.MethodDelete:
		if os.Remove(s.blobPath(q.ref)) != nil {
			refuse(w, http.StatusNotFound, "BLOB_UNKNOWN", "blob unknown to registry")
			return
		}
		w.WriteHeader(http.StatusAccepted)
	default:
		refuse(w, http.StatusMethodNotAllowed, "UNSUPPORTED", r.Method)
	}
}

// upload serves a session: POST begins it (or takes a whole blob), PATCH appends, PUT appends and ends it.
func (s *embedded) upload(w http.ResponseWriter, r *http.Request, q question) {
	digest := r.URL.Query().Get("digest")
	if digest != "" && !reDigest.MatchString(digest) {
		refuse(w, http.StatusBadRequest, "DIGEST_INVALID", "not a digest")
		return
	}
	if r.Method == http.MethodPost {
		if m := r.URL.Query().Get("mount"); reDigest.MatchString(m) {
			if _, err := os.Stat(s.blobPath(m)); err == nil {
				s.created(w, q.repo, m)
				return
			}
		}
		id, u, err := s.begin()
		if err != nil {
			refuse(w, http.StatusInternalServerError, "UNKNOWN", err.Error())
			return
		}
		if digest == "" {
			s.accepted(w, q.repo, id, u)
			return
		}
		s.finish(w, r, q.repo, id, u, digest)
		return
	}
	s.mu.Lock()
	u := s.uploads[q.ref]
	s.mu.Unlock()
	if u == nil {
		refuse(w, http.StatusNotFound, "BLOB_UPLOAD_UNKNOWN", "upload unknown to registry")
		return
	}
	switch r.Method {
	case http.MethodPatch:
		if start, _, ok := strings.Cut(r.Header.Get("Content-Range"), "-"); ok {
			if n, err := strconv.ParseInt(start, 10, 64); err != nil || n != u.len() {
				s.location(w, q.repo, q.ref, u)
				refuse(w, http.StatusRequestedRangeNotSatisfiable, "BLOB_UPLOAD_INVALID", "chunk out of order")
				return
			}
		}
		if err := u.append(r.Body); err != nil {
			s.drop(q.ref)
			refuse(w, http.StatusBadRequest, "BLOB_UPLOAD_INVALID", err.Error())
			return
		}
		s.accepted(w, q.repo, q.ref, u)
	case http.MethodPut:
		s.finish(w, r, q.repo, q.ref, u, digest)
	case http.MethodGet:
		s.location(w, q.repo, q.ref, u)
		w.WriteHeader(http.StatusNoContent)
	case http.MethodDelete:
		s.drop(q.ref)
		w.WriteHeader(http.StatusNoContent)
	default:
		refuse(w, http.StatusMethodNotAllowed, "UNSUPPORTED", r.Method)
	}
}

func (s *embedded) begin() (string, *upload, error) {
	id := rand.Text()
	f, err := os.Create(filepath.Join(s.dir, "uploads", id))
	if err != nil {
		return "", nil, err
	}
	u := &upload{f: f, hash: sha256.New()}
	s.mu.Lock()
	s.uploads[id] = u
	s.mu.Unlock()
	return id, u, nil
}

func (u *upload) len() int64 {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.size
}

func (u *upload) append(r io.Reader) error {
	u.mu.Lock()
	defer u.mu.Unlock()
	n, err := io.Copy(io.MultiWriter(u.f, u.hash), r)
	u.size += n
	return err
}

func (s *embedded) drop(id string) {
	s.mu.Lock()
	u := s.uploads[id]
	delete(s.uploads, id)
	s.mu.Unlock()
	if u != nil {
		u.f.Close()
		os.Remove(u.f.Name())
	}
}

func (s *embedded) location(w http.ResponseWriter, repo, id string, u *upload) {
	w.Header().Set("Location", "/v2/"+repo+"/blobs/uploads/"+id)
	w.Header().Set("Docker-Upload-Uuid", id)
	w.Header().Set("Range", fmt.Sprintf("0-%d", max(0, u.len()-1)))
}

func (s *embedded) accepted(w http.ResponseWriter, repo, id string, u *upload) {
	s.location(w, repo, id, u)
	w.WriteHeader(http.StatusAccepted)
}

func (s *embedded) created(w http.ResponseWriter, repo, digest string) {
	w.Header().Set("Location", "/v2/"+repo+"/blobs/"+digest)
	w.Header().Set("Docker-Content-Digest", digest)
	w.WriteHeader(http.StatusCreated)
}

func (s *embedded) finish(w http.ResponseWriter, r *http.Request, repo, id string, u *upload, digest string) {
	defer s.drop(id)
	if err := u.append(r.Body); err != nil {
		refuse(w, http.StatusBadRequest, "BLOB_UPLOAD_INVALID", err.Error())
		return
	}
	if got := "sha256:" + hex.EncodeToString(u.hash.Sum(nil)); got != digest {
		refuse(w, http.StatusBadRequest, "DIGEST_INVALID", "the content hashes to "+got)
		return
	}
	if err := os.Rename(u.f.Name(), s.blobPath(digest)); err != nil {
		refuse(w, http.StatusInternalServerError, "UNKNOWN", err.Error())
		return
	}
	s.created(w, repo, digest)
}

const maxManifest = 16 << 20

func (s *embedded) manifest(w http.ResponseWriter, r *http.Request, q question) {
	isDigest := reDigest.MatchString(q.ref)
	if !isDigest && !reTag.MatchString(q.ref) {
		refuse(w, http.StatusBadRequest, "TAG_INVALID", "neither tag nor digest")
		return
	}
	tagFile := s.repoPath(q.repo, "tags", q.ref)
	switch r.Method {
	case http.MethodPut:
		s.putManifest(w, r, q, isDigest)
		return
	case http.MethodGet, http.MethodHead, http.MethodDelete:
	default:
		refuse(w, http.StatusMethodNotAllowed, "UNSUPPORTED", r.Method)
		return
	}
	digest := q.ref
	if !isDigest {
		b, err := os.ReadFile(tagFile)
		if err != nil {
			refuse(w, http.StatusNotFound, "MANIFEST_UNKNOWN", "manifest unknown: tag "+q.ref)
			return
		}
		digest = string(b)
	}
	typeFile := s.repoPath(q.repo, "manifests", strings.TrimPrefix(digest, "sha256:"))
	mediaType, err := os.ReadFile(typeFile)
	if err != nil {
		refuse(w, http.StatusNotFound, "MANIFEST_UNKNOWN", "manifest unknown: "+digest)
		return
	}
	if r.Method == http.MethodDelete {
		os.Remove(map[bool]string{true: typeFile, false: tagFile}[isDigest])
		w.WriteHeader(http.StatusAccepted)
		return
	}
	body, err := os.ReadFile(s.blobPath(digest))
	if err != nil {
		refuse(w, http.StatusNotFound, "MANIFEST_UNKNOWN", err.Error())
		return
	}
	w.Header().Set("Content-Type", string(mediaType))
	w.Header().Set("Docker-Content-Digest", digest)
	w.Header().Set("Content-Length", strconv.Itoa(len(body)))
	w.WriteHeader(http.StatusOK)
	if r.Method == http.MethodGet {
		w.Write(body)
	}
}

func (s *embedded) putManifest(w http.ResponseWriter, r *http.Request, q question, isDigest bool) {
	body, err := io.ReadAll(io.LimitReader(r.Body, maxManifest+1))
	if err != nil || len(body) > maxManifest {
		refuse(w, http.StatusBadRequest, "MANIFEST_INVALID", "too large or cut")
		return
	}
	var doc struct {
		MediaType    string `json:"mediaType"`
		ArtifactType string `json:"artifactType"`
		Config       struct{ MediaType string }
		Annotations  map[string]string `json:"annotations"`
		Subject      *struct {
			Digest string `json:"digest"`
		} `json:"subject"`
	}
	if err := json.Unmarshal(body, &doc); err != nil {
		refuse(w, http.StatusBadRequest, "MANIFEST_INVALID", err.Error())
		return
	}
	sum := sha256.Sum256(body)
	digest := "sha256:" + hex.EncodeToString(sum[:])
	if isDigest && q.ref != digest {
		refuse(w, http.StatusBadRequest, "DIGEST_INVALID", "the content hashes to "+digest)
		return
	}
	mediaType := r.Header.Get("Content-Type")
	if mediaType == "" {
		mediaType = doc.MediaType
	}
	err = errors.Join(
		writeFile(s.blobPath(digest), body),
		writeFile(s.repoPath(q.repo, "manifests", digest[7:]), []byte(mediaType)))
	if err == nil && !isDigest {
		err = writeFile(s.repoPath(q.repo, "tags", q.ref), []byte(digest))
	}
	if err == nil && doc.Subject != nil && reDigest.MatchString(doc.Subject.Digest) {
		if doc.ArtifactType == "" {
			doc.ArtifactType = doc.Config.MediaType
		}
		var desc []byte
		desc, err = json.Marshal(map[string]any{
			"mediaType": mediaType, "digest": digest, "size": len(body),
			"artifactType": doc.ArtifactType, "annotations": doc.Annotations,
		})
		if err == nil {
			err = writeFile(s.repoPath(q.repo, "referrers", doc.Subject.Digest[7:], digest[7:]), desc)
		}
		if s.referrers {
			w.Header().Set("Oci-Subject", doc.Subject.Digest)
		}
	}
	if err != nil {
		refuse(w, http.StatusInternalServerError, "UNKNOWN", err.Error())
		return
	}
	w.Header().Set("Location", "/v2/"+q.repo+"/manifests/"+digest)
	w.Header().Set("Docker-Content-Digest", digest)
	w.WriteHeader(http.StatusCreated)
}

// writeFile makes a file whole or not at all.
func writeFile(name string, b []byte) error {
	if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
		return err
	}
	f, err := os.CreateTemp(filepath.Dir(name), ".new-*")
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	if err = errors.Join(err, f.Close()); err == nil {
		err = os.Rename(f.Name(), name)
	}
	if err != nil {
		os.Remove(f.Name())
	}
	return err
}

// names lists a directory without temporary files, sorted; a missing one is empty.
func names(dir string) []string {
	list, _ := os.ReadDir(dir)
	var out []string
	for _, e := range list {
		if !strings.HasPrefix(e.Name(), ".") {
			out = append(out, e.Name())
		}
	}
	slices.Sort(out)
	return out
}

func (s *embedded) tags(w http.ResponseWriter, r *http.Request, q question) {
	if _, err := os.Stat(s.repoPath(q.repo)); err != nil {
		refuse(w, http.StatusNotFound, "NAME_UNKNOWN", "repository name not known to registry")
		return
	}
	tags := names(s.repoPath(q.repo, "tags"))
	if last := r.URL.Query().Get("last"); last != "" {
		i, found := slices.BinarySearch(tags, last)
		if found {
			i++
		}
		tags = tags[i:]
	}
	if n, err := strconv.Atoi(r.URL.Query().Get("n")); err == nil && n >= 0 && n < len(tags) {
		tags = tags[:n]
		if n > 0 {
			w.Header().Set("Link", fmt.Sprintf(`</v2/%s/tags/list?last=%s&n=%d>; rel="next"`, q.repo, url.QueryEscape(tags[n-1]), n))
		}
	}
	w.Header().Set("Content-Type", "application/json")
	json.NewEncoder(w).Encode(map[string]any{"name": q.repo, "tags": tags})
}

func (s *embedded) refs(w http.ResponseWriter, r *http.Request, q question) {
	if !s.referrers {
		refuse(w, http.StatusNotFound, "UNSUPPORTED", "no referrers API")
		return
	}
	if !reDigest.MatchString(q.ref) {
		refuse(w, http.StatusBadRequest, "DIGEST_INVALID", "not a digest")
		return
	}
	want := r.URL.Query().Get("artifactType")
	list := []json.RawMessage{}
	dir := s.repoPath(q.repo, "referrers", q.ref[7:])
	for _, name := range names(dir) {
		b, err := os.ReadFile(filepath.Join(dir, name))
		var d struct{ ArtifactType string }
		if err != nil || json.Unmarshal(b, &d) != nil || want != "" && d.ArtifactType != want {
			continue
		}
		list = append(list, b)
	}
	w.Header().Set("Content-Type", "application/vnd.oci.image.index.v1+json")
	if want != "" {
		w.Header().Set("OCI-Filters-Applied", "artifactType")
	}
	json.NewEncoder(w).Encode(map[string]any{"schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json", "manifests": list})
}
