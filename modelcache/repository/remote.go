// Stores: what lies at a URI of S3, Google Cloud Storage or Azure.

package repository

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/url"
	"path"
	"slices"
	"strings"
	"sync"
	"time"

	"go.uber.org/zap"
	"gocloud.dev/blob"
	"gocloud.dev/gcerrors"

	"flightsvc/internal/control"
	"flightsvc/internal/fault"
	"flightsvc/internal/protocol"
	"flightsvc/internal/savedmodel"
)

// Models may lie in stores, laid out as in a folder. A program decides which stores it can read by importing their
// drivers (gocloud.dev/blob/s3blob, gcsblob, azureblob): the front imports all three.

// schemes are those of stores in gocloud.dev/blob; credentials says for each how to give the server access.
var (
	schemes     = []string{"s3", "gs", "azblob"}
	credentials = map[string]string{
		"s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, in the server's environment, or " +
			"give its host a role; the region is AWS_REGION or ?region= in the URI",
		"gs": "set GOOGLE_APPLICATION_CREDENTIALS in the server's environment to the file of a service account, " +
			"or give its host one",
		"azblob": "set AZURE_STORAGE_ACCOUNT and AZURE_STORAGE_KEY or AZURE_STORAGE_SAS_TOKEN in the server's " +
			"environment",
	}
)

const knownSchemes = "URIs file:, s3:, gs: and azblob:"

// Bounds on a store.
const (
	maxObjects     = maxEntries // below one model
	maxNames       = 1000       // models below a model-root
	listTimeout    = 30 * time.Second
	maxSettings    = 1 << 20     // bytes of a settings file
	freshListing   = time.Second // an older listing is renewed before something is said to be missing
	listingsAtOnce = 8           // models of a model-root that are listed at once
)

// IsURI reports whether a model-root is a place in a store rather than a folder.
func IsURI(text string) bool {
	scheme, _, ok := strings.Cut(text, "://")
	return ok && scheme != "" && !strings.ContainsRune(scheme, '/')
}

// location is a folder in a store.
type location struct {
	uri    string // the whole
	name   string // the same without the parameters, for messages
	bucket string // URI of the bucket, with the parameters
	prefix string // of the folder's objects: "" or ends with /
}

// parseLocation reads a URI of a store. Its error is a sentence that does not name the model.
func parseLocation(uri string) (location, error) {
	parsed, err := url.Parse(uri)
	if err != nil {
		return location{}, fmt.Errorf("it is not a URI; write it as s3://bucket/path")
	}
	switch {
	case !slices.Contains(schemes, parsed.Scheme):
		return location{}, fmt.Errorf("there is no source %q; this server reads %s", parsed.Scheme, knownSchemes)
	case parsed.Host == "":
		return location{}, fmt.Errorf("it names no bucket; want %s://bucket/path", parsed.Scheme)
	case parsed.User != nil || parsed.Fragment != "":
		return location{}, fmt.Errorf(
			"it has a user or a fragment; credentials do not belong in a URI: %s", credentials[parsed.Scheme])
	case parsed.Query().Has("private_key_path"):
		return location{}, fmt.Errorf("private_key_path is not supported; %s", credentials[parsed.Scheme])
	}
	folder := strings.Trim(parsed.Path, "/")
	if folder != "" && (path.Clean(folder) != folder || folder == ".." || strings.HasPrefix(folder, "../")) {
		return location{}, fmt.Errorf("its path must not contain ., .. or double slashes")
	}
	at := location{}
	bucket := url.URL{Scheme: parsed.Scheme, Host: parsed.Host, RawQuery: parsed.Query().Encode()}
	at.bucket = bucket.String()
	return at.below(folder), nil
}

// below returns the location of a folder in this one, this one itself for "".
func (at location) below(folder string) location {
	if folder != "" {
		at.prefix += folder + "/"
	}
	whole, _ := url.Parse(at.bucket) // parseLocation has made it
	whole.Path = "/" + strings.TrimSuffix(at.prefix, "/")
	at.uri = whole.String()
	at.name, _, _ = strings.Cut(at.uri, "?")
	return at
}

func (at location) scheme() string {
	scheme, _, _ := strings.Cut(at.bucket, ":")
	return scheme
}

// listing is what lies at a location.
type listing struct {
	at       time.Time
	plain    *snapshot // a SavedModel without versions; nil if there is none
	versions map[string]*snapshot
	settings *file
}

// stores are the buckets that were opened, and what was seen in them. The zero value is ready to use.
type stores struct {
	mu       sync.Mutex
	buckets  map[string]*blob.Bucket // by URI
	otherTag map[string]bool         // buckets whose checksums are no MD5 sums, by URI

	listings memo[listing]        // by URI of the location
	settings memo[storedSettings] // the same

	listing shared[listing]
}

type storedSettings struct {
	of       file
	settings Settings
}

// open returns the bucket of a location. It stays open until close.
func (s *stores) open(ctx context.Context, at location) (*blob.Bucket, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if bucket, ok := s.buckets[at.bucket]; ok {
		return bucket, nil
	}
	bucket, err := blob.OpenBucket(context.WithoutCancel(ctx), at.bucket)
	if err != nil {
		return nil, err
	}
	if s.buckets == nil {
		s.buckets = map[string]*blob.Bucket{}
	}
	s.buckets[at.bucket] = bucket
	return bucket, nil
}

func (s *stores) close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, bucket := range s.buckets {
		_ = bucket.Close()
	}
	s.buckets = nil
}

// listed returns a listing of a location that is at most age old; 0 is any age. If the store does not answer, an older
// listing is returned.
func (r *Repository) listed(ctx context.Context, ref string, at location, age time.Duration) (listing, error) {
	s := &r.stores
	last, ok := s.listings.get(at.uri)
	if ok && (age == 0 || time.Since(last.at) < age) {
		return last, nil
	}
	fresh, err := s.listing.do(ctx, r, at.uri, func(ctx context.Context) (listing, error) {
		ctx, cancel := context.WithTimeout(ctx, listTimeout)
		defer cancel()
		found, err := r.list(ctx, at)
		if err != nil {
			return listing{}, err
		}
		s.listings.put(at.uri, found)
		return found, nil
	})
	switch {
	case err == nil:
		return fresh, nil
	case ctx.Err() != nil:
		return listing{}, ctx.Err()
	case ok && gcerrors.Code(err) != gcerrors.NotFound && gcerrors.Code(err) != gcerrors.PermissionDenied:
		r.options.Log.Warn("store does not answer; its last listing is used", zap.String("model", ref),
			zap.String("uri", at.uri), zap.Error(err))
		return last, nil
	}
	return listing{}, storeFault(ref, at, err)
}

// list asks the store for the objects of a location.
func (r *Repository) list(ctx context.Context, at location) (listing, error) {
	found := listing{at: time.Now(), versions: map[string]*snapshot{}}
	bucket, err := r.stores.open(ctx, at)
	if err != nil {
		return found, err
	}
	plain := &snapshot{}
	objects := bucket.List(&blob.ListOptions{Prefix: at.prefix})
	for count := 0; ; count++ {
		object, err := objects.Next(ctx)
		if err == io.EOF {
			break
		}
		if err != nil {
			return found, err
		}
		if count == maxObjects {
			return found, fault.New(fault.BadRequest, "%s has more than %d objects; name the folder of one model",
				at.name, maxObjects)
		}
		name := strings.TrimPrefix(object.Key, at.prefix)
		if name == "" || strings.HasSuffix(name, "/") {
			continue // an object with which a console marks a folder
		}
		one := file{path: name, size: object.Size, changed: object.ModTime, md5: object.MD5}
		if name == control.SettingsFile {
			found.settings = &one
		}
		plain.files = append(plain.files, one)
		if number, rest, ok := strings.Cut(name, "/"); ok && isNumber(number) {
			version := found.versions[number]
			if version == nil {
				version = &snapshot{}
				found.versions[number] = version
			}
			one.path = rest
			version.files = append(version.files, one)
		}
	}
	if plain.seal(); slices.ContainsFunc(plain.files, func(f file) bool { return f.path == savedmodel.File }) {
		plain.at, found.plain, found.versions = found.at, plain, nil
	}
	for _, version := range found.versions {
		version.at = found.at
		version.seal()
	}
	return found, nil
}

// remote returns the versions of a listing as candidates, by number; a SavedModel without versions is version 1.
func (r *Repository) remote(at location, found listing) (list []candidate) {
	add := func(number string, place location, now snapshot) {
		list = append(list, candidate{number: number, look: func() (snapshot, condition) {
			return now, r.seen.judge(place.uri, now, quietRemote)
		}})
	}
	if found.plain != nil {
		add("1", at, *found.plain)
	}
	for number, now := range found.versions {
		add(number, at.below(number), *now)
	}
	slices.SortFunc(list, func(a, b candidate) int { return byNumber(a.number, b.number) })
	return list
}

// findRemote is lookUp for a place in a store.
func (r *Repository) findRemote(ctx context.Context, ref, version string, at location, wait bool) (Model, error) {
	var found listing
	attempt := func(age time.Duration) (number string, now snapshot, err error) {
		return await(ctx, ref, version, wait, func(again int) (_ []candidate, err error) {
			if again > 0 {
				age = freshListing // the same listing again would say nothing new
			}
			found, err = r.listed(ctx, ref, at, age)
			return r.remote(at, found), err
		})
	}
	number, now, err := attempt(r.options.PollInterval)
	if err == nil && number == "" && time.Since(found.at) > freshListing {
		number, now, err = attempt(freshListing) // the version may have come since
	}
	switch {
	case err != nil:
		return Model{}, err
	case number == "" && found.plain != nil:
		return Model{}, fault.New(fault.NotFound, "model %s: no version %s; %s is a SavedModel without versions", ref,
			version, at.name)
	case number == "" && len(found.versions) == 0:
		return Model{}, fault.New(fault.NotFound, "model %s: there is no %s at %s, nor numbered folders with one; "+
			"check the path, and that the server's credentials may list it", ref, savedmodel.File, at.name)
	case number == "":
		return Model{}, fault.New(fault.NotFound, "model %s: %s holds no complete version %s", ref, at.name, version)
	}
	place := at
	if found.plain == nil {
		place = at.below(number)
	}
	digest, err := r.fetch(ctx, ref, number, place, now)
	if err != nil {
		return Model{}, err
	}
	model := Model{Ref: ref, Version: number, Dir: r.Place(digest), Base: at.uri, Stamp: now.stamp, Digest: digest}
	if found.plain != nil {
		model.Settings, err = readSettings(ctx, model.Dir)
	} else if found.settings != nil {
		model.Settings, err = r.storedSettings(ctx, ref, at, *found.settings)
	}
	if err != nil {
		return Model{}, err
	}
	return r.withSaved(ctx, model, snapshot{}) // the files of a digest never change
}

// storedSettings reads a settings file beside versions in a store, once for as long as it stays the same.
func (r *Repository) storedSettings(ctx context.Context, ref string, at location, about file) (Settings, error) {
	s := &r.stores
	known, ok := s.settings.get(at.uri)
	// size and checksum, too, because times in a store are whole seconds
	if of := known.of; ok && of.changed.Equal(about.changed) && of.size == about.size &&
		bytes.Equal(of.md5, about.md5) {
		return known.settings, nil
	}
	bucket, err := s.open(ctx, at)
	if err != nil {
		return Settings{}, storeFault(ref, at, err)
	}
	if about.size > maxSettings {
		return Settings{}, fault.New(fault.BadRequest, "model %s: %s at %s has %d bytes, more than %d", ref,
			control.SettingsFile, at.name, about.size, maxSettings)
	}
	text, err := bucket.ReadAll(ctx, at.prefix+control.SettingsFile)
	if err != nil {
		return Settings{}, storeFault(ref, at, err)
	}
	settings, err := parseSettings(text, at.prefix+control.SettingsFile)
	if err != nil {
		return Settings{}, fault.New(fault.BadRequest, "model %s: settings in the store: %w", ref, err)
	}
	if slices.ContainsFunc(settings.OpLibraries, func(library string) bool { return !path.IsAbs(library) }) {
		return Settings{}, fault.New(fault.BadRequest, "model %s: op_libraries in %s beside versions in a store must "+
			"be absolute paths of the server's host", ref, control.SettingsFile)
	}
	s.settings.put(at.uri, storedSettings{of: about, settings: settings})
	return settings, nil
}

// names lists the folders of a location, at most maxNames.
func (r *Repository) names(ctx context.Context, at location) ([]string, error) {
	bucket, err := r.stores.open(ctx, at)
	if err != nil {
		return nil, err
	}
	var names []string
	for objects := bucket.List(&blob.ListOptions{Prefix: at.prefix, Delimiter: "/"}); len(names) < maxNames; {
		object, err := objects.Next(ctx)
		if err == io.EOF {
			return names, nil
		}
		if err != nil {
			return nil, err
		}
		if name := strings.Trim(strings.TrimPrefix(object.Key, at.prefix), "/"); object.IsDir && name != "" &&
			!strings.HasPrefix(name, ".") && name != protocol.Image {
			names = append(names, name)
		}
	}
	return names, nil
}

// storeFault makes a fault of a store's or driver's error. It says which store, what is wrong, and what to set.
func storeFault(ref string, at location, err error) error {
	if _, ok := fault.KindOf(err); ok || errors.Is(err, context.Canceled) {
		return err
	}
	var answer interface {
		ErrorCode() string
		ErrorMessage() string
	}
	code, words := "", strings.Join(strings.Fields(rootOf(err).Error()), " ")
	if errors.As(err, &answer) { // the store's own words, without the request around them
		code = answer.ErrorCode()
		words = strings.TrimSuffix(strings.TrimSpace(code+": "+answer.ErrorMessage()), ":")
	}
	has := func(parts ...string) bool {
		return slices.ContainsFunc(parts, func(part string) bool {
			return strings.Contains(code+" "+err.Error(), part)
		})
	}
	scheme := at.scheme()
	bucket, _, _ := strings.Cut(at.bucket, "?")
	switch kind := gcerrors.Code(err); {
	case kind == gcerrors.NotFound && has("NoSuchBucket", "bucket doesn't exist", "bucket does not exist",
		"ContainerNotFound"):
		return fault.New(fault.NotFound, "model %s: there is no bucket %s (%s); check its name, and ?endpoint= and "+
			"?region= in the URI", ref, bucket, words)
	case kind == gcerrors.NotFound:
		return fault.New(fault.NotFound, "model %s: %s is not there (%s)", ref, at.name, words)
	case has("InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken", "AuthenticationFailed"):
		return fault.New(fault.Precondition, "model %s: %s rejects the server's credentials (%s); %s", ref, bucket,
			words, credentials[scheme])
	case kind == gcerrors.PermissionDenied || has("AccessDenied", "Forbidden", "AuthorizationFailure",
		"StatusCode: 403"):
		return fault.New(fault.Precondition, "model %s: the server's credentials may not read %s (%s); let them list "+
			"and get its objects, or %s", ref, at.name, words, credentials[scheme])
	case has("get credentials", "refresh cached credentials", "could not find default credentials",
		"AccountName is required", "DefaultAzureCredential", "no EC2 IMDS role", "shared config profile",
		"private key should be a PEM"):
		return fault.New(fault.Precondition, "model %s: this server has no credentials for %s (%s); %s", ref, bucket,
			words, credentials[scheme])
	case has("region"):
		return fault.New(fault.Precondition, "model %s: %s needs a region (%s); %s",
			ref, bucket, words, credentials[scheme])
	case has("query parameter", "invalid value", "open bucket"):
		return fault.New(fault.BadRequest, "model %s: %s cannot be used (%s); see docs/models.md",
			ref, at.bucket, words)
	case errors.Is(err, context.DeadlineExceeded):
		return fault.New(fault.Unavailable, "model %s: %s does not answer within %s", ref, at.name, listTimeout)
	}
	return fault.New(fault.Unavailable, "model %s: %s cannot be read (%s); ask again, and check ?endpoint= and the "+
		"network if it happens again", ref, at.name, words)
}

// rootOf returns the innermost error that still says something.
func rootOf(err error) error {
	for {
		inner := errors.Unwrap(err)
		if inner == nil {
			return err
		}
		err = inner
	}
}
