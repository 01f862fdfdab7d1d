"""A store in files: `store` keeps the contract, `folder` does the disk's work, `janitor` frees room."""
