package modelcache

import "context"

func (c *Cache) digest(context.Context, Model) (string, error) { return "", nil }
func (c *Cache) hold(Model) (func(), error)                    { return func() {}, nil }
func (c *Cache) settled(ctx context.Context, ref string) ([]string, error) {
	base, err := c.folder(ref)
	return versions(base), err
}
func profilesDir(cacheDir string) string { return cacheDir + "/profiles" }
